"""``python -m models gc``: give back the room of what nobody needs."""

from __future__ import annotations

import argparse
import asyncio
from datetime import UTC, datetime, timedelta

from models.collection import GRACE, Plan, Waste
from models.commands.terminal import Commands, myself, show_json
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
    gc.add_argument(
        "--store", metavar="URL", help="a folder or fsspec URL; default: $FRONTIER_ARTIFACTS"
    )
    gc.add_argument("--json", action="store_true", help="for a program")
    gc.set_defaults(run=_gc, usage=gc.error)


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
