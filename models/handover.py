"""Decide about a candidate and, if it wins, move the alias: the acting half of ``promotion``."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import ConfigError
from models.promotion import Decision, Measurements, Policy, decide
from models.registry import Registry
from models.versions import CHAMPION, Alias, Reference, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """What became of a wish to promote."""

    version: Version
    before: Alias
    after: Alias | None
    """``None``: rejected; the alias stays where it was."""
    decision: Decision | None
    """``None``: nothing was to be decided, as for an alias without gates."""
    refusal: str | None = None
    """Why nothing could be decided."""
    forced: str | None = None
    """The reason that somebody gave for going on all the same."""


async def promote(
    registry: Registry,
    reference: Reference | str,
    *,
    to: str = CHAMPION,
    policy: Policy | None = None,
    measurements: Measurements | None = None,
    by: str,
    reason: str = "",
    force: str | None = None,
) -> Handover:
    """Let a version have an alias; ``champion`` only if it passes the gates of ``policy``.

    The alias moves only if it still points at the champion that the candidate was compared
    with: of several promotions at once one wins, and the others raise ``Conflict``.

    Args:
        measurements: of the candidate; recorded. Default: the last that were recorded.
        force: promote whatever the gates say, for this reason, which goes to the audit log.

    Raises:
        NotFound: no such version.
        Conflict: somebody else moved the alias while this was deciding.
        ConfigError: the version is archived or its files are gone, or the measurements are
            of another artifact.
    """
    version = await registry.resolve(reference)
    if measurements is not None:
        if measurements.artifact != version.artifact:
            raise ConfigError(
                f"the measurements are of artifact {measurements.artifact:.12}, "
                f"{version} is {version.artifact:.12}"
            )
        await registry.record(measurements)
    before = await registry.alias(version.name, to)
    decision, refusal = None, None
    if to == CHAMPION and before.number != version.number:
        decision, refusal = await _judge(registry, version, before, policy or Policy())
    passed = refusal is None and (decision is None or decision.promoted)
    after = None
    if passed or force is not None:
        after = await registry.promote(
            Reference(name=version.name, number=version.number),
            to,
            expected=before.revision,
            by=by,
            reason=force or reason,
            approve=to == CHAMPION,
            details={
                "forced": None if passed else force,
                "refusal": refusal,
                "decision": None if decision is None else decision.facts(),
            },
        )
    return Handover(
        version=version,
        before=before,
        after=after,
        decision=decision,
        refusal=refusal,
        forced=None if passed else force,
    )


async def _judge(
    registry: Registry, version: Version, before: Alias, policy: Policy
) -> tuple[Decision | None, str | None]:
    found = await registry.measurements(version.artifact)
    if found is None:
        return None, f"{version} was never measured; evaluate it as it is served, then promote it"
    champion = None
    if before.number is not None:
        present = await registry.resolve(Reference(name=version.name, number=before.number))
        champion = await registry.measurements(present.artifact)
        if champion is None:
            return None, (
                f"the champion, {present}, was never measured; "
                "evaluate it on the same golden set, then promote"
            )
    manifest = await registry.manifest(version.artifact)
    return decide(found, champion, policy, trained=manifest.gates), None
