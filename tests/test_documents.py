"""The documents do not lie: links lead somewhere, code that says it runs does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import documents
from tests.documents import Block

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("path", documents.documents(), ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    missing = [target for target in documents.links(path) if not (path.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("block", documents.marked("run"), ids=str)
def test_code_runs(block: Block) -> None:
    documents.run(block)


SAMPLE = """
[here](README.md) [there](https://example.org) [part](#part)
```python run
assert 1 + 1 == 2
```
- in a list
  ```console run
  $ echo one \\
      two
  one two
  $ seq 3
  1
  ...
  ```
```yaml
[not](a-link)
```
"""


def test_blocks_are_found_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    path = tmp_path / "README.md"
    path.write_text(SAMPLE)
    python, console, yaml = documents.blocks(path)
    assert (python.line, str(console)) == (3, "README.md:7")
    assert yaml.words == frozenset()
    assert list(documents.links(path)) == ["README.md"]
    for block in documents.marked("run"):
        documents.run(block)


@pytest.mark.parametrize(
    "code", ["```bash run\nfalse\n```", "```console run\n$ echo one\ntwo\n```", "```go run\n```"]
)
def test_what_does_not_hold_is_said(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(code)
    (block,) = documents.marked("run")
    with pytest.raises(AssertionError):
        documents.run(block)
