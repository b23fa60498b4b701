"""``python -m deployments.admin``: tenants, their keys and limits, what they see and what they
use, and the audit log.

    python -m deployments.admin plans
    python -m deployments.admin create acme --plan pro
    python -m deployments.admin change acme --limit tokens_per_day=500000
    python -m deployments.admin issue acme --role developer --label "the web shop"
    python -m deployments.admin rotate 3f2a9c41d07b --overlap 24h
    python -m deployments.admin revoke 3f2a9c41d07b
    python -m deployments.admin usage --by day,tenant --since 2026-11-01 --csv
    python -m deployments.admin alerts
    python -m deployments.admin audit
    python -m deployments.admin visibility smollm2:poet --only acme
    python -m deployments.admin export acme --to acme.ndjson
    python -m deployments.admin delete acme --yes
    python -m deployments.admin retention --yes

It works on the database itself, so it needs no key, and no platform that runs. Gateways see
every change within a second. A key is printed once, alone on standard output.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from tempfile import NamedTemporaryFile

from pydantic import TypeAdapter, ValidationError

from deployments.config import GatewayConfig
from deployments.gateway.schemas.tenants import Overrides
from deployments.launcher import preflight
from deployments.tenants.alerts import raised
from deployments.tenants.deletion import Deletion, stores
from deployments.tenants.directory import Directory, Key, Tenant
from deployments.tenants.export import export
from deployments.tenants.keys import Minted, Peppers
from deployments.tenants.ledger import By, as_csv, priced, report
from deployments.tenants.plans import LimitName
from deployments.tenants.principal import Role, Scope, granted
from deployments.tenants.retention import Retention
from deployments.tenants.sight import ruled, split
from deployments.tenants.visibility import Visibility
from models.commands.terminal import myself, say, show_table, when
from models.errors import ConfigError, InvalidInput, PlatformError
from state.cache import Bounds, open_cache
from state.counters import open_counters
from state.database import Database
from state.errors import StateError
from state.places import Places

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
FIRST_TENANT = "admin"
OVERRIDES: TypeAdapter[Overrides] = TypeAdapter(Overrides)
"""What the admin routes take, too."""


def duration(text: str) -> timedelta:
    """``90d``, ``24h``, ``30m``, ``10s``."""
    found = re.fullmatch(r"(\d{1,6})([smhd])", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; expected 90d, 24h, 30m or 10s")
    return timedelta(seconds=int(found[1]) * UNITS[found[2]])


def override(text: str) -> tuple[str, float | None]:
    """``tokens_per_day=500000``; ``tokens_per_day=none`` is no limit."""
    name, _, amount = text.partition("=")
    try:
        told = OVERRIDES.validate_python({name: None if amount == "none" else amount})
    except ValidationError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no limit; expected NAME=AMOUNT or NAME=none, of {', '.join(LimitName)}"
        ) from None
    return name, told[LimitName(name)]


def lines_for(text: str) -> list[By]:
    """``day,tenant``."""
    try:
        return list(dict.fromkeys(By(each) for each in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no report; expected some of {', '.join(By)}, with commas"
        ) from None


def day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day; expected 2026-11-25") from None


async def _create(directory: Directory, given: argparse.Namespace) -> None:
    made = await directory.create(
        given.tenant, plan=given.plan, overrides=dict(given.limit or ()), by=myself()
    )
    say(_told(made))


async def _change(directory: Directory, given: argparse.Namespace) -> None:
    suspended = True if given.suspend else False if given.resume else None
    overrides = {} if given.no_limits else dict(given.limit) if given.limit else None
    made = await directory.change(
        given.tenant, plan=given.plan, overrides=overrides, suspended=suspended, by=myself()
    )
    say(_told(made))


def _told(tenant: Tenant) -> str:
    own = f", {_limits(tenant.overrides)}" if tenant.overrides else ""
    return (
        f"tenant {tenant.name}, plan {tenant.plan}{own}{', suspended' if tenant.suspended else ''}"
    )


async def _tenants(directory: Directory, _: argparse.Namespace) -> None:
    show_table(
        ("tenant", "plan", "created", "suspended", "limits of its own"),
        [
            (
                each.name,
                each.plan,
                when(each.created),
                _when(each.suspended),
                _limits(each.overrides),
            )
            for each in await directory.tenants()
        ],
    )


async def _issue(directory: Directory, given: argparse.Namespace) -> None:
    scopes = frozenset(given.scope) if given.scope else None
    _show_key(
        await directory.issue(
            given.tenant,
            role=given.role,
            scopes=scopes,
            label=given.label,
            lifetime=given.lifetime,
            by=myself(),
        )
    )


async def _rotate(directory: Directory, given: argparse.Namespace) -> None:
    _show_key(await directory.rotate(given.key, overlap=given.overlap, by=myself()))
    say(f"{given.key} works until then, for {given.overlap}")


async def _revoke(directory: Directory, given: argparse.Namespace) -> None:
    key = await directory.revoke(given.key, by=myself())
    say(f"{key.id} of {key.tenant} is revoked")


async def _keys(directory: Directory, given: argparse.Namespace) -> None:
    show_table(
        ("key", "role", "scopes", "created", "expires", "revoked", "label"),
        [
            (
                key.id,
                key.role,
                " ".join(sorted(granted(key.role, key.scopes))),
                when(key.created),
                _when(key.expires),
                _when(key.revoked),
                key.label,
            )
            for key in await directory.keys(given.tenant)
        ],
    )


async def _plans(_: Directory, given: argparse.Namespace) -> None:
    show_table(
        ("plan", *LimitName),
        [
            (name, *("" if amount is None else f"{amount:.12g}" for _, amount in plan.limits))
            for name, plan in _gateway(given).plans.items()
        ],
    )


async def _usage(directory: Directory, given: argparse.Namespace) -> None:
    found = await report(
        directory.database, by=given.by, tenant=given.tenant, since=given.since, until=given.until
    )
    lines = priced(found)
    if given.csv:
        print(as_csv(lines), end="")
        return
    head = list(lines[0]) if lines else [*given.by, "requests"]
    show_table(head, [["" if v is None else str(v) for v in line.values()] for line in lines])


async def _alerts(directory: Directory, given: argparse.Namespace) -> None:
    show_table(
        ("when", "tenant", "what", "month", "reached"),
        [
            (when(each.at), each.tenant, each.kind, each.period, f"{each.threshold} %")
            for each in await raised(directory.database, tenant=given.tenant, limit=given.limit)
        ],
    )


async def _audit(directory: Directory, given: argparse.Namespace) -> None:
    show_table(
        ("when", "who", "what", "subject", "details"),
        [
            (when(each.at), each.who, each.what, each.subject, _facts(each.details))
            for each in await directory.audit(limit=given.limit)
        ],
    )


async def _visibility(directory: Directory, given: argparse.Namespace) -> None:
    visibility = Visibility(directory.database)
    if given.model is not None and (given.all or given.only or given.nobody):
        name = ruled(*split(given.model))
        tenants = None if given.all else given.only or ()
        await visibility.show(name, tenants, by=myself())
    elif given.all or given.only or given.nobody:
        raise InvalidInput("Name the model that these may see.")
    show_table(
        ("model", "tenants"),
        [
            (name, " ".join(sorted(tenants)) or "(nobody)")
            for name, tenants in sorted((await visibility.rules()).items())
        ],
    )


async def _export(directory: Directory, given: argparse.Namespace) -> None:
    lines = 0
    # Whole or not at all, and for its owner's eyes only.
    with NamedTemporaryFile(dir=given.to.parent, prefix=f".{given.to.name}.") as file:
        async with aclosing(export(directory.database, given.tenant, by=myself())) as held:
            async for line in held:
                file.write(line.encode())
                lines += 1
        file.flush()
        os.link(file.name, given.to)
    say(f"{lines} lines about {given.tenant} in {given.to}")


async def _delete(directory: Directory, given: argparse.Namespace) -> None:
    async with AsyncExitStack() as stack:
        places, counters, cache = Places.of(), None, None
        if is_there(places.counters):
            counters = open_counters(places.counters)
            stack.push_async_callback(counters.close)
        if is_there(places.cache):
            cache = open_cache(places.cache, Bounds(max_bytes=0, max_entry_bytes=0))
            stack.push_async_callback(cache.close)
        deletion = Deletion(database=directory.database, elsewhere=stores(counters, cache))
        if not given.yes:
            held = _facts(await deletion.held(given.tenant))
            say(f"would delete {given.tenant}: {held}; add --yes")
            return
        done = await deletion.delete(given.tenant, by=myself())
    say(f"{given.tenant} is deleted: {_facts(done.removed)}")
    say(f"kept as {done.called!r}: {_facts(done.renamed)}")


def is_there(url: str) -> bool:
    """Whether a store outside this process has anything: a file that nobody has made has not."""
    scheme, rest = url.partition(":")[::2]
    return scheme != "memory" and (scheme != "sqlite" or Path(rest.removeprefix("//")).exists())


async def _retention(directory: Directory, given: argparse.Namespace) -> None:
    retention = Retention(database=directory.database, config=_gateway(given).retention)
    if not given.yes:
        say(f"would remove {_facts(await retention.count())}; add --yes")
        return
    say(f"removed {_facts(await retention.enforce(by=myself()))}")


async def _bootstrap(directory: Directory, _: argparse.Namespace) -> None:
    """An administrator's key, if there is no living one yet."""
    if all(tenant.name != FIRST_TENANT for tenant in await directory.tenants()):
        await directory.create(FIRST_TENANT, plan="enterprise", by=myself())
    keys = await directory.keys(FIRST_TENANT)
    if any(key.role is Role.ADMIN and key.live(datetime.now(UTC)) for key in keys):
        say(f"tenant {FIRST_TENANT} has an administrator's key; `issue` makes another one")
        return
    _show_key(await directory.issue(FIRST_TENANT, role=Role.ADMIN, label="first", by=myself()))


def _gateway(given: argparse.Namespace) -> GatewayConfig:
    """Raises ConfigError: there is none."""
    platform = preflight.load(given.config).platform
    if platform is None:
        raise ConfigError(f"{given.config}: there is no application of {preflight.PLATFORM} in it")
    return platform.gateway


def _limits(overrides: Mapping[str, float | None]) -> str:
    return ", ".join(
        f"{name}={'none' if amount is None else f'{amount:.12g}'}"
        for name, amount in overrides.items()
    )


def _when(moment: datetime | None) -> str:
    return "" if moment is None else when(moment)


def _facts(details: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in details.items())


def _show_key(made: tuple[Key, Minted]) -> None:
    key, minted = made
    until = f", until {when(key.expires)}" if key.expires else ""
    say(f"key {key.id} of {key.tenant}, {key.role}{until}; it is shown this once:")
    print(minted.text, flush=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m deployments.admin",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--database", metavar="URL", help="default: $FRONTIER_DATABASE")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, told: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=told, description=told)
        one.set_defaults(run=run)
        return one

    def limited(one: argparse._ActionsContainer) -> None:
        one.add_argument(
            "--limit",
            type=override,
            action="append",
            metavar="NAME=AMOUNT",
            help="in place of the plan's, and of all it had of its own; AMOUNT may be none",
        )

    def configured(one: argparse.ArgumentParser) -> None:
        one.add_argument(
            "--config", type=Path, default=Path("serve_config.yaml"), help="default: %(default)s"
        )

    one = command("create", _create, "make a tenant")
    one.add_argument("tenant")
    one.add_argument("--plan", default="free", help="default: free")
    limited(one)
    one = command(
        "change", _change, "give a tenant another plan or limits of its own, suspend or resume it"
    )
    one.add_argument("tenant")
    one.add_argument("--plan")
    own = one.add_mutually_exclusive_group()
    limited(own)
    own.add_argument("--no-limits", action="store_true", help="those of the plan, and no others")
    state = one.add_mutually_exclusive_group()
    state.add_argument("--suspend", action="store_true", help="refuse all its requests")
    state.add_argument("--resume", action="store_true")
    command("tenants", _tenants, "list the tenants")
    one = command("issue", _issue, "make a key and print it, once")
    one.add_argument("tenant")
    one.add_argument("--role", type=Role, choices=list(Role), default=Role.DEVELOPER)
    one.add_argument(
        "--scope", type=Scope, choices=list(Scope), action="append", help="fewer rights"
    )
    one.add_argument("--label", default="", help="for people: what it is for")
    one.add_argument("--lifetime", type=duration, metavar="90d", help="default: for ever")
    one = command("rotate", _rotate, "make a successor of a key; the old one works on for a while")
    one.add_argument("key")
    one.add_argument("--overlap", type=duration, default=timedelta(days=1), metavar="24h")
    one = command("revoke", _revoke, "end a key at once")
    one.add_argument("key")
    one = command("keys", _keys, "list a tenant's keys")
    one.add_argument("tenant")
    configured(command("plans", _plans, "list the plans, as they are configured"))
    one = command("usage", _usage, "say what was used, and what it cost")
    one.add_argument("--by", type=lines_for, default=list(By)[:3], metavar="day,model,tenant")
    one.add_argument("--tenant")
    one.add_argument("--since", type=day, metavar="DAY", help="the first, in UTC")
    one.add_argument("--until", type=day, metavar="DAY", help="the last, in UTC")
    one.add_argument("--csv", action="store_true")
    one = command("alerts", _alerts, "list the budgets that reached 50, 80 and 100 percent")
    one.add_argument("--tenant")
    one.add_argument("--limit", type=int, default=50)
    one = command("audit", _audit, "list who changed what, the newest first")
    one.add_argument("--limit", type=int, default=50)
    one = command("visibility", _visibility, "say which tenants see a model, or list who sees what")
    one.add_argument("model", nargs="?", metavar="MODEL[:ADAPTER]")
    seen = one.add_mutually_exclusive_group()
    seen.add_argument("--all", action="store_true", help="everybody")
    seen.add_argument("--only", action="append", metavar="TENANT", help="once for each")
    seen.add_argument("--nobody", action="store_true", help="but operators and administrators")
    one = command("export", _export, "write all that is held of a tenant to a file, a line each")
    one.add_argument("tenant")
    one.add_argument("--to", type=Path, required=True, metavar="FILE", help="a new one")
    one = command("delete", _delete, "say what is held of a tenant; with --yes, delete it for good")
    one.add_argument("tenant")
    one.add_argument("--yes", action="store_true", help="delete it")
    one = command(
        "retention", _retention, "say what was kept for long enough; with --yes, remove it"
    )
    configured(one)
    one.add_argument("--yes", action="store_true", help="remove it")
    command("bootstrap", _bootstrap, "make an administrator's key, unless there is one")
    return top


async def run(given: argparse.Namespace) -> None:
    async with await Database.open(given.database) as database:
        await given.run(Directory(database, Peppers.of(os.environ)), given)


def main(words: Sequence[str] | None = None) -> int:
    given = parser().parse_args(words)
    try:
        asyncio.run(run(given))
    except PlatformError as error:
        say(f"error: {error.message}")
        return 1
    except StateError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error.filename2 or error.filename}: {error.strerror}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
