"""``python -m models list | show | card | licences | audit``: look, and change nothing."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterable
from typing import Any

from models.artifact import Manifest
from models.cards import data_card, licences, model_card
from models.commands.terminal import Commands, Tree, ago, show_json, show_table, size, when
from models.errors import NotFound
from models.registry import MAX_PAGE, Registry, open_registry
from models.versions import Ancestor, Lineage, Reference, Version

REFERENCE = "NAME@VERSION or NAME@ALIAS; NAME alone is its champion"


def add(commands: Commands) -> None:
    listing = commands.add_parser(
        "list",
        help="models, or the versions of one",
        description="Models with their aliases; given a NAME, its versions, the newest first.",
    )
    listing.add_argument("name", nargs="?", metavar="NAME")
    listing.add_argument(
        "--limit", type=int, default=MAX_PAGE, metavar="N", help=f"1 to {MAX_PAGE}"
    )
    listing.add_argument("--cursor", metavar="TEXT", help="what the last page said comes next")
    listing.set_defaults(run=_list)

    show = commands.add_parser(
        "show",
        help="one version's lineage: data, run, artifact, aliases, who serves it",
        description="A version's lineage: data, run, artifact, aliases, who serves it.",
    )
    show.add_argument(
        "reference",
        metavar="NAME[@REF]",
        help="a version number or an alias; without: its champion, else its newest version",
    )
    show.set_defaults(run=_show)

    card = commands.add_parser(
        "card",
        help="model card or data card in Markdown",
        description="A model card in Markdown, from the facts in the manifest.",
    )
    card.add_argument("reference", metavar="NAME[@REF]", help=REFERENCE)
    card.add_argument("--data", action="store_true", help="of what it learned from, instead")
    card.set_defaults(run=_card)

    inventory = commands.add_parser(
        "licences",
        help="licences of all models and of their data",
        description="Licences of all versions in use, and of the data behind them.",
    )
    inventory.set_defaults(run=_licences)

    audit = commands.add_parser(
        "audit",
        help="who changed what, and when",
        description="Who changed what, and when; the newest first.",
    )
    audit.add_argument(
        "subject", nargs="?", metavar="SUBJECT", help="as NAME@champion; default: everything"
    )
    audit.add_argument("--limit", type=int, default=50, metavar="N", help=f"1 to {MAX_PAGE}")
    audit.set_defaults(run=_audit)

    for command in (listing, show, inventory, audit):
        command.add_argument("--json", action="store_true", help="for a program")


def _list(arguments: argparse.Namespace) -> int:
    async def look() -> Any:
        async with open_registry() as registry:
            if arguments.name is None:
                return await registry.models(limit=arguments.limit, cursor=arguments.cursor)
            page = await registry.versions(
                arguments.name, limit=arguments.limit, cursor=arguments.cursor
            )
            if not page.items and arguments.cursor is None:
                raise NotFound(f"the registry has no model {arguments.name}")
            return page

    page = asyncio.run(look())
    if arguments.json:
        show_json(page)
        return 0
    if arguments.name is None:
        show_table(
            ("name", "kind", "versions", "newest", "aliases"),
            (
                (
                    model.name,
                    model.newest.kind,
                    str(model.versions),
                    model.newest.full_name,
                    ", ".join(f"{alias.alias} → {alias.number}" for alias in model.aliases),
                )
                for model in page.items
            ),
        )
    else:
        show_table(
            ("version", "state", "kind", "size", "created", "by", "artifact"),
            (
                (
                    version.full_name,
                    version.state + (", files gone" if version.collected else ""),
                    version.kind,
                    size(version.size),
                    when(version.created),
                    version.created_by,
                    version.artifact[:12],
                )
                for version in page.items
            ),
        )
    if page.next is not None:
        print(f"more: --cursor {page.next}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    async def look() -> Lineage:
        async with open_registry() as registry:
            return await registry.lineage(await _meant(registry, arguments.reference))

    lineage = asyncio.run(look())
    if arguments.json:
        show_json(lineage)
    else:
        print(*lineage_tree(lineage).lines(), sep="\n")
    return 0


async def _meant(registry: Registry, text: str) -> Reference:
    """A name without a champion yet means its newest version."""
    reference = Reference.parse(text)
    if "@" not in text and reference.alias is not None:
        present = await registry.alias(reference.name, reference.alias)
        newest = await registry.versions(reference.name, limit=1)
        if present.number is None and newest.items:
            return Reference(name=reference.name, number=newest.items[0].number)
    return reference


def lineage_tree(lineage: Lineage) -> Tree:
    version, manifest = lineage.version, lineage.manifest
    gone = ", files gone" if version.collected else ""
    moves = lineage.moves[-8:]
    branches = [
        Tree(
            f"artifact {version.artifact[:12]}  {size(version.size)}  {version.uri}",
            [*_origin(manifest), *map(_ancestor, lineage.parents)],
        ),
        Tree(f"registered {when(version.created)} by {version.created_by}"),
        *(
            Tree(f"alias {alias.alias} since {when(alias.since)} by {alias.by}")
            for alias in lineage.aliases
            if alias.since is not None
        ),
    ]
    if moves:
        branches.append(
            Tree(
                "history",
                [
                    Tree(
                        f"{when(move.at)} {move.action} {move.alias}: "
                        f"{move.previous or 'none'} → {move.number or 'none'} by {move.by}"
                        + (f" ({move.reason})" if move.reason else "")
                    )
                    for move in moves
                ],
            )
        )
    branches += [
        Tree(
            f"{'served by' if use.kind == 'serving' else 'used by run'} {use.name}"
            f"{f' {use.replica}' if use.replica else ''} since {when(use.since)}, "
            f"seen {ago(use.seen)}"
        )
        for use in lineage.uses
    ]
    if lineage.children:
        branches.append(Tree("went into", [Tree(_versioned(child)) for child in lineage.children]))
    return Tree(f"{version.full_name}  {version.kind}  {version.state}{gone}", branches)


def _origin(manifest: Manifest) -> Iterable[Tree]:
    data, run = manifest.data, manifest.run
    learned = Tree(
        " ".join(
            filter(None, ("data", data.sha256[:12], data.description, f"({data.licence or '?'})"))
        )
    )
    if run is None:
        yield learned
    else:
        yield Tree(
            f"run {run.id}: recipe {run.recipe}, seed {run.seed}, code {run.code_revision[:19]}",
            [learned],
        )
    for gate in manifest.gates:
        value = "missing" if gate.value is None else f"{gate.value:g}"
        yield Tree(
            f"gate {gate.metric} {value}, expected {gate.expected}: "
            f"{'passed' if gate.passed else 'FAILED'}"
        )


def _ancestor(ancestor: Ancestor) -> Tree:
    names = ", ".join(map(_versioned, ancestor.versions)) or "not registered"
    return Tree(
        f"made from {ancestor.artifact[:12]}  {names}",
        [
            *([] if ancestor.manifest is None else _origin(ancestor.manifest)),
            *map(_ancestor, ancestor.parents),
        ],
    )


def _versioned(version: Version) -> str:
    return f"{version.full_name} ({version.state})"


def _card(arguments: argparse.Namespace) -> int:
    async def look() -> Manifest:
        async with open_registry() as registry:
            version = await registry.resolve(await _meant(registry, arguments.reference))
            return await registry.manifest(version.artifact)

    manifest = asyncio.run(look())
    print(data_card(manifest) if arguments.data else model_card(manifest), end="")
    return 0


def _licences(arguments: argparse.Namespace) -> int:
    async def look() -> list[tuple[str, Manifest]]:
        async with open_registry() as registry:
            return [
                (version.full_name, await registry.manifest(version.artifact))
                for version in (await registry.snapshot()).versions
                if version.state != "archived"
            ]

    found = licences(asyncio.run(look()))
    if arguments.json:
        show_json(found)
    else:
        show_table(
            ("version", "licence", "data", "artifact"),
            ((each.version, each.model, each.data, each.artifact[:12]) for each in found),
        )
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    async def look() -> Any:
        async with open_registry() as registry:
            return await registry.audit(subject=arguments.subject, limit=arguments.limit)

    page = asyncio.run(look())
    if arguments.json:
        show_json(page)
    else:
        show_table(
            ("when", "who", "what", "subject", "reason"),
            (
                (
                    when(entry.at),
                    entry.who,
                    entry.what,
                    entry.subject,
                    str(entry.details.get("reason", "")),
                )
                for entry in page.items
            ),
        )
    return 0
