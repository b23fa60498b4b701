"""``python -m deployments.guardrails.safety [--write]``"""

from __future__ import annotations

from deployments.guardrails.safety.fit import main

if __name__ == "__main__":
    main()
