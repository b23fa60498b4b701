"""Tests that nobody waits for at each edit: ``python -m tests.unhurried [RESULTS.xml ...]``.

The list is measured, not kept by hand: from what pytest wrote with ``--junitxml``, test functions
whose cases take longer together than ``AT_ONCE_S`` go to ``unhurried.txt``, and ``conftest.py``
marks them ``integration``. ``scripts/test`` runs them all, and is what makes the results.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

LIST = Path(__file__).with_suffix(".txt")
RESULTS = Path(".cache/test")
STAGES = ("fast.xml", "integration.xml")
AT_ONCE_S = 0.15


def key(nodeid: str) -> str:
    """Of a test function, whichever its parameters: ``tests.engines.test_kv.test_positions``."""
    return nodeid.partition("[")[0].replace("/", ".").replace(".py::", ".").replace("::", ".")


def listed() -> frozenset[str]:
    return frozenset(LIST.read_text().split() if LIST.exists() else ())


def unhurried(results: Iterable[Path]) -> list[str]:
    """Keys, in order."""
    seconds: Counter[str] = Counter()
    for path in results:
        for case in ElementTree.parse(path).iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}"
            seconds[key(name)] += float(case.get("time", 0))
    return sorted(name for name, took in seconds.items() if took > AT_ONCE_S)


def main(words: list[str]) -> None:
    results = [Path(word) for word in words] or [RESULTS / name for name in STAGES]
    LIST.write_text("".join(f"{name}\n" for name in unhurried(results)))


if __name__ == "__main__":
    main(sys.argv[1:])
