"""``python -m models fetch``: weights for this node, ahead of time."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from models import yaml_file
from models.commands.terminal import Commands, say
from models.errors import ConfigError
from models.sources import SCHEMES, default_cache, fetch


def add(commands: Commands) -> None:
    command = commands.add_parser(
        "fetch",
        help="bring weights to this node",
        description="Bring weights to this node and print their folder, one a line.",
    )
    command.add_argument("source", nargs="?", metavar="SOURCE", help=SCHEMES)
    command.add_argument(
        "--config", type=Path, metavar="FILE", help="every source that a serve_config.yaml names"
    )
    command.add_argument(
        "--cache", type=Path, metavar="DIR", help=f"default: $FRONTIER_CACHE or {default_cache()}"
    )
    command.add_argument("--sha256", metavar="HEX", help="what SOURCE's weights must have")
    command.set_defaults(run=_fetch, usage=command.error)


def _fetch(arguments: argparse.Namespace) -> int:
    if (arguments.source is None) == (arguments.config is None):
        arguments.usage("give either SOURCE or --config FILE")
    if arguments.config is not None and arguments.sha256 is not None:
        arguments.usage("--sha256 belongs to SOURCE; in a file it stands beside each source")
    wanted = (
        sources_in(arguments.config)
        if arguments.config is not None
        else [(arguments.source, arguments.sha256)]
    )
    for source, sha256 in wanted:
        print(fetch(source, cache=arguments.cache, sha256=sha256, report=say), flush=True)
    return 0


def sources_in(config: Path) -> Iterator[tuple[str, str | None]]:
    """Source and sha256 of every model that a ``serve_config.yaml`` names, each once.

    Raises:
        ConfigError: no such file, not YAML, or no model in it.
    """
    tree = yaml_file.read(config)
    found: dict[tuple[str, str | None], None] = {}
    try:
        for application in tree["applications"]:
            for model in ((application.get("args") or {}).get("models") or {}).values():
                match model.get("source"), model.get("sha256"):
                    case None, _:
                        continue
                    case (str(source), (str() | None) as sha256):
                        found[source, sha256] = None
                    case given:
                        raise TypeError(f"{given} is not text")
    except (KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{config}: expected applications[*].args.models.NAME.source (and sha256), both text"
        ) from None
    if not found:
        raise ConfigError(f"{config}: names no source of weights in applications[*].args.models")
    yield from found
