"""``python -m models gc | encrypt``: keep the store small, and closed."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime, timedelta

from models.collection import GRACE, Plan, Waste
from models.commands.terminal import Commands, myself, show_json
from models.encryption import VARIABLE, VARIABLE_FILE, Keyring
from models.errors import ConfigError
from models.registry import open_registry
from models.store import Store


def add(commands: Commands) -> None:
    gc = commands.add_parser(
        "gc",
        help="remove the files of archived and forgotten artifacts",
        description="Say which artifacts nobody needs; with --yes, remove their files. Whatever "
        "an alias, a version that is not archived, a replica or a run needs stays, with "
        "everything it was made from.",
    )
    gc.add_argument("--yes", action="store_true", help="remove them")
    gc.add_argument(
        "--grace",
        type=float,
        default=GRACE / timedelta(hours=1),
        metavar="HOURS",
        help="what is younger, or was in use within this time, stays (default: %(default)g)",
    )
    gc.set_defaults(run=_gc, usage=gc.error)

    encrypt = commands.add_parser(
        "encrypt",
        help="encrypt what a store holds under the newest key",
        description="Say which artifacts of a store are not encrypted, or not under the newest "
        f"key of {VARIABLE} or {VARIABLE_FILE}; with --yes, encrypt them.",
    )
    encrypt.add_argument("--yes", action="store_true", help="encrypt them")
    encrypt.set_defaults(run=_encrypt)

    for command in (gc, encrypt):
        command.add_argument(
            "--store", metavar="URL", help="a folder or fsspec URL; default: $FRONTIER_ARTIFACTS"
        )
        command.add_argument("--json", action="store_true", help="for a program")


def _gc(arguments: argparse.Namespace) -> int:
    if not arguments.grace >= 0:
        arguments.usage(f"--grace is {arguments.grace}; expected hours, 0 or more")
    grace = timedelta(hours=arguments.grace)

    async def act() -> tuple[Plan, list[Waste]]:
        store = Store(arguments.store)
        async with open_registry() as registry:
            plan = await registry.plan(store.list(), grace=grace)
            if not arguments.yes:
                return plan, []
            gone = [
                waste
                for waste in plan.waste
                if await registry.collect(waste, store.delete, by=myself(), grace=grace)
            ]
            store.sweep(datetime.now(UTC) - max(grace, GRACE))
            return plan, gone

    plan, gone = asyncio.run(act())
    if arguments.json:
        show_json({"waste": plan.waste, "needed": plan.needed, "removed": gone})
        return 0
    for waste in plan.waste:
        done = "removed" if waste in gone else "needed by now" if arguments.yes else "would remove"
        print(f"{done} {waste.sha256}: {waste.reason}")
    print(f"{len(plan.waste)} of no use, {len(plan.needed)} needed")
    return 0


def _encrypt(arguments: argparse.Namespace) -> int:
    ring = Keyring.of()
    if ring.newest is None:
        raise ConfigError(f"there is no key to encrypt with; set {VARIABLE_FILE} or {VARIABLE}")
    store = Store(arguments.store)
    published = [each.sha256 for each in store.list() if each.complete]
    under = {sha256: store.encrypted_under(sha256) for sha256 in published}
    due = {sha256: keys for sha256, keys in under.items() if keys != {ring.newest}}
    if arguments.yes:
        for sha256 in due:
            store.encrypt(sha256, ring=ring)
    if arguments.json:
        show_json({"key": ring.newest, "artifacts": len(under), "due": list(due)})
        return 0
    done, when = ("encrypted", "before") if arguments.yes else ("would encrypt", "now")
    for sha256, keys in due.items():
        state = sorted(f"under {key}" if key else "not encrypted" for key in keys)
        print(f"{done} {sha256} ({when}: {', '.join(state)})")
    print(f"{len(due)} due, {len(under) - len(due)} under {ring.newest}")
    return 0
