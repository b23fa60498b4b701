"""``python -m models promote | rollback | archive | restore``: what is the champion, and why."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from pydantic import ValidationError

from models.commands.inspection import REFERENCE
from models.commands.terminal import Commands, myself, say, show_json
from models.errors import ConfigError
from models.handover import Handover, promote
from models.promotion import Measurements, Policy
from models.registry import open_registry
from models.versions import CHAMPION, Alias, Reference, State, Version


def add(commands: Commands) -> None:
    promotion = commands.add_parser(
        "promote",
        help="let a version have an alias, if it passes the gates",
        description="Let a version have an alias. 'champion' is given only to what passes the "
        "gates; every gate is explained, and the exit code is 1 when one rejects it.",
    )
    promotion.add_argument("reference", metavar="NAME@REF", help="a version number or an alias")
    promotion.add_argument("--to", default=CHAMPION, metavar="ALIAS", help="default: champion")
    promotion.add_argument(
        "--measurements",
        type=Path,
        metavar="FILE",
        help="JSON of an evaluation; default: the last that was recorded",
    )
    promotion.add_argument(
        "--policy", type=Path, metavar="FILE", help="YAML: bounds and weights other than the usual"
    )
    promotion.add_argument(
        "--force", metavar="REASON", help="whatever the gates say; the reason is kept in the audit"
    )
    promotion.add_argument("--reason", default="", metavar="TEXT", help="for the audit log")
    promotion.set_defaults(run=_promote)

    rollback = commands.add_parser(
        "rollback",
        help="point an alias at where it pointed before",
        description="Point an alias at where it pointed before; again: one step further back.",
    )
    rollback.add_argument("reference", metavar="NAME[@ALIAS]", help="default: the alias champion")
    rollback.add_argument("--reason", default="", metavar="TEXT", help="for the audit log")
    rollback.set_defaults(run=_rollback)

    archive = commands.add_parser(
        "archive",
        help="take a version out of use; gc may then remove its files",
        description="Take a version out of use. Its files stay until gc removes them.",
    )
    restore = commands.add_parser(
        "restore",
        help="put an archived version back into staging",
        description="Put an archived version back into staging, if its files are still there.",
    )
    for command, state in ((archive, State.ARCHIVED), (restore, State.STAGING)):
        command.add_argument("reference", metavar="NAME@REF", help=REFERENCE)
        command.add_argument("--reason", default="", metavar="TEXT", help="for the audit log")
        command.set_defaults(run=_transition, state=state)

    for command in (promotion, rollback, archive, restore):
        command.add_argument("--json", action="store_true", help="for a program")


def _promote(arguments: argparse.Namespace) -> int:
    if arguments.force is not None and not arguments.force.strip():
        raise ConfigError("--force wants a reason, for the audit log")
    policy = None if arguments.policy is None else read_policy(arguments.policy)
    measurements = (
        None
        if arguments.measurements is None
        else Measurements.decode(_read(arguments.measurements), str(arguments.measurements))
    )

    async def act() -> Handover:
        async with open_registry() as registry:
            return await promote(
                registry,
                _exact(arguments.reference),
                to=arguments.to,
                policy=policy,
                measurements=measurements,
                by=myself(),
                reason=arguments.reason,
                force=arguments.force,
            )

    done = asyncio.run(act())
    if arguments.json:
        show_json(done)
        return 0 if done.after else 1
    if done.decision is not None:
        print(*done.decision.explain(), sep="\n")
    if done.refusal is not None:
        say(f"{'overruled' if done.forced else 'error'}: {done.refusal}")
    if done.after is None:
        return 1
    if done.forced is not None:
        print(f"promoted all the same: {done.forced}")
    print(f"{done.after} → {done.version.full_name}")
    return 0


def _exact(text: str) -> Reference:
    """To promote "NAME" would mean to promote the champion."""
    if "@" not in text and Reference.parse(text).number is None:
        raise ConfigError(f"{text!r} names no version; expected NAME@VERSION or NAME@ALIAS")
    return Reference.parse(text)


def read_policy(file: Path) -> Policy:
    """Raises ConfigError naming the key."""
    import yaml

    try:
        return Policy.model_validate(yaml.safe_load(_read(file)) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not YAML ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "it"
        known = ", ".join(Policy.model_fields)
        hint = f"; known keys: {known}" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{file}: {key}: {first['msg']}{hint}") from None


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None


def _rollback(arguments: argparse.Namespace) -> int:
    reference = Reference.parse(arguments.reference)
    alias = reference.alias
    if alias is None:
        raise ConfigError(f"{arguments.reference!r} is a version; expected NAME@ALIAS")

    async def act() -> Alias:
        async with open_registry() as registry:
            seen = await registry.alias(reference.name, alias)
            return await registry.rollback(
                reference.name,
                alias,
                expected=seen.revision,
                by=myself(),
                reason=arguments.reason,
            )

    now = asyncio.run(act())
    if arguments.json:
        show_json(now)
    else:
        print(f"{now} → {'nothing' if now.number is None else now.number}")
    return 0


def _transition(arguments: argparse.Namespace) -> int:
    async def act() -> Version:
        async with open_registry() as registry:
            return await registry.transition(
                _exact(arguments.reference), arguments.state, by=myself(), reason=arguments.reason
            )

    version = asyncio.run(act())
    if arguments.json:
        show_json(version)
    else:
        print(f"{version.full_name} {version.state}")
    return 0
