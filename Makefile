# Thin aliases; the work is in scripts/.
.PHONY: setup serve test check bench lock clean

setup serve test check bench lock:
	@scripts/$@

clean:
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis
