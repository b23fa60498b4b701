"""``python -m models``: models from the command line.

``fetch`` brings weights to this node ahead of time, so that replicas start at once. The
other commands work on the registry: what was trained, what is served, and why.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from models.commands import fetch, housekeeping, inspection, promotion, registration
from models.commands.terminal import say
from models.errors import PlatformError


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m models",
        description=__doc__,
        epilog="Everything durable lives under FRONTIER_HOME; see state/places.py.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for subject in (fetch, inspection, registration, promotion, housekeeping):
        subject.add(commands)
    return top


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        code: int = arguments.run(arguments)
    except PlatformError as error:
        say(f"error: {error.message}")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
