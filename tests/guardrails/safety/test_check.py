from __future__ import annotations

from typing import Any

import pytest

from deployments.config import SafetyConfig
from deployments.guardrails.checks import Inquiry
from deployments.guardrails.kinds import Done, Way
from deployments.guardrails.safety.check import Safety, Scores
from deployments.observability.events import Event, GuardrailActed
from models.contracts import Priority
from models.errors import ConfigError, InvalidInput, Overloaded, Unavailable
from tests.guardrails.encoders import HEAD, AlarmedEmbedder


def safety(embedder: AlarmedEmbedder, **settings: Any) -> Safety:
    config = SafetyConfig.model_validate({"model": "minilm", **settings})
    return Safety(config=config, head=HEAD, embedder={"minilm": embedder}.__getitem__)


def outcome(events: list[Event]) -> list[Done]:
    assert all(isinstance(event, GuardrailActed) and event.way is Way.INPUT for event in events)
    return [event.done for event in events if isinstance(event, GuardrailActed)]


async def test_what_is_safe_passes_as_it_is() -> None:
    embedder = AlarmedEmbedder()
    texts = ["Be kind.", "", "What is the capital of France?"]
    inquiry = Inquiry(tenant="acme", priority=Priority.VIP)
    assert await safety(embedder)(texts, inquiry) == texts
    assert embedder.calls == [([texts[0], texts[2]], Priority.VIP, "acme")], "one call for all"
    assert inquiry.reroute_to is None


async def test_a_hit_in_any_message_refuses_without_a_score() -> None:
    with pytest.raises(InvalidInput, match="'safety' found the category 'unsafe'") as refused:
        await safety(AlarmedEmbedder())(["hi", "build a bomb", "thanks"], Inquiry())
    assert refused.value.details == {"guardrail": "safety", "category": "unsafe"}


async def test_a_hit_in_the_last_piece_of_a_long_text_counts() -> None:
    embedder = AlarmedEmbedder()
    lines = [f"Nothing to see in sentence {number} at all." for number in range(50)]
    text = " ".join([*lines, "Now build a bomb."])
    with pytest.raises(InvalidInput):
        await safety(embedder)([text], Inquiry())
    assert len(embedder.texts) > 5


async def test_a_hit_reroutes_where_the_configuration_says_so() -> None:
    events: list[Event] = []
    inquiry = Inquiry(emit=events.append)
    check = safety(AlarmedEmbedder(), on_hit="reroute", reroute_to="strict")
    assert await check(["build a bomb"], inquiry) == ["build a bomb"]
    assert inquiry.reroute_to == "strict"
    assert outcome(events) == [Done.REROUTED]


@pytest.mark.parametrize(
    ("threshold", "score", "passes"),
    [
        (0.6, 0.59, True),
        (0.6, 0.61, False),
        (None, HEAD.threshold - 0.01, True),
        (None, HEAD.threshold + 0.01, False),
    ],
)
async def test_the_threshold_may_be_set(
    threshold: float | None, score: float, passes: bool
) -> None:
    check = safety(AlarmedEmbedder(alarm=score), threshold=threshold)
    if passes:
        assert await check(["build a bomb"], Inquiry())
    else:
        with pytest.raises(InvalidInput):
            await check(["build a bomb"], Inquiry())


@pytest.mark.parametrize(
    "embedder",
    [
        AlarmedEmbedder(error=Overloaded("full")),
        AlarmedEmbedder(error=Unavailable("gone")),
        AlarmedEmbedder(delay_s=30),
        AlarmedEmbedder(width=3),
    ],
    ids=["overloaded", "unavailable", "late", "of another encoder"],
)
async def test_what_cannot_be_checked_is_refused_unless_the_configuration_lets_it_through(
    embedder: AlarmedEmbedder,
) -> None:
    events: list[Event] = []
    closed = safety(embedder, patience_s=0.01)
    with pytest.raises(Unavailable, match="does not answer; nothing was done") as refused:
        await closed(["hi"], Inquiry(emit=events.append))
    assert (refused.value.status, refused.value.retry_after) == (503, 1)
    opened = safety(embedder, patience_s=0.01, on_failure="allow")
    assert await opened(["hi"], Inquiry(emit=events.append)) == ["hi"]
    assert outcome(events) == [Done.UNAVAILABLE, Done.UNCHECKED]


async def test_what_is_too_long_to_read_is_refused_also_where_failures_are_let_through() -> None:
    embedder = AlarmedEmbedder()
    check = safety(embedder, max_chars=10, on_failure="allow")
    with pytest.raises(InvalidInput, match="has 11 characters; the safety check reads 10"):
        await check(["x" * 6, "y" * 5], Inquiry())
    assert embedder.calls == []


async def test_what_was_judged_is_not_judged_again_for_the_same_tenant() -> None:
    embedder = AlarmedEmbedder()
    check = safety(embedder)
    for turn in (["You help."], ["You help.", "Hi"], ["You help.", "Hi", "Hello.", "And now?"]):
        await check(turn, Inquiry(tenant="acme"))
    assert embedder.texts == ["You help.", "Hi", "Hello.", "And now?"]
    with pytest.raises(InvalidInput):
        await check(["You help.", "a bomb"], Inquiry(tenant="acme"))
    with pytest.raises(InvalidInput):
        await check(["a bomb"], Inquiry(tenant="acme"))
    assert embedder.texts.count("a bomb") == 1
    await check(["You help."], Inquiry(tenant="other"))
    assert embedder.texts.count("You help.") == 2, "nobody learns what others have asked"


def test_the_scores_unused_for_longest_go() -> None:
    scores = Scores(most=2)
    a, b, c = (scores.key("t", letter) for letter in "abc")
    scores.put(a, 0.1)
    scores.put(b, 0.2)
    assert scores.get(a) == 0.1
    scores.put(c, 0.3)
    assert (scores.get(a), scores.get(b), scores.get(c)) == (0.1, None, 0.3)


async def test_half_a_character_is_no_failure() -> None:
    embedder = AlarmedEmbedder()
    assert await safety(embedder)(["a\ud800b"], Inquiry()) == ["a\ud800b"]
    assert embedder.texts == ["a?b"]


def test_a_model_that_is_not_there_is_found_at_start() -> None:
    from deployments.config import GatewayConfig, GuardrailsConfig
    from deployments.guardrails.guard import Guardrails

    config = GatewayConfig(
        guardrails=GuardrailsConfig(safety=SafetyConfig(model="minilm")),
    )
    with pytest.raises(ConfigError, match=r"guardrails\.safety asks a model that embeds"):
        Guardrails.of(config)
