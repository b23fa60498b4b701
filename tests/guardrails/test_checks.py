"""What every check promises, whichever it is; and what it tells of what it did."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deployments.config import SafetyConfig
from deployments.guardrails import blocked
from deployments.guardrails.checks import OFF_LOOP, InputCheck, Inquiry, Length, Screening
from deployments.guardrails.guard import Guard
from deployments.guardrails.kinds import Action, Done, PiiKind, Way
from deployments.guardrails.pii import RULES
from deployments.guardrails.safety.check import Safety
from deployments.guardrails.screen import Screen
from deployments.observability.events import Event, GuardrailActed
from models.contracts import ChatMessage, Conversation, Delta, FinishReason
from models.errors import InvalidInput
from tests.guardrails.encoders import HEAD, AlarmedEmbedder

SECRET = "a bomb for jane.doe@example.org"


def screening(action: Action) -> Screening:
    return Screening(Screen([(rule, action) for rule in RULES[PiiKind.EMAIL]]))


def blocking() -> Screening:
    return Screening(Screen([(rule, Action.REFUSE) for rule in blocked.rules("x", ["bomb"], [])]))


def safety() -> Safety:
    return Safety(
        config=SafetyConfig(model="m"), head=HEAD, embedder=lambda name: AlarmedEmbedder()
    )


CHECKS: dict[str, tuple[Callable[[], InputCheck], str, str]] = {
    "length": (lambda: Length(12), "prompt_length", "characters"),
    "pii": (lambda: screening(Action.REFUSE), "pii", "email"),
    "blocked": (blocking, "blocked", "x"),
    "safety": (safety, "safety", "unsafe"),
}
EVERY = pytest.mark.parametrize(
    ("make", "guardrail", "category"), CHECKS.values(), ids=CHECKS.keys()
)


@EVERY
async def test_texts_that_are_fine_come_back_in_order(
    make: Callable[[], InputCheck], guardrail: str, category: str
) -> None:
    events: list[Event] = []
    texts = ["one", "", "two", "one"]
    assert list(await make()(texts, Inquiry(emit=events.append))) == texts
    assert await make()([], Inquiry()) == []
    assert events == []


@EVERY
async def test_a_refusal_names_the_rule_and_nothing_of_the_text(
    make: Callable[[], InputCheck], guardrail: str, category: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        await make()(["fine", SECRET], Inquiry())
    error = refused.value
    assert (error.details["guardrail"], error.details["category"]) == (guardrail, category)
    told = f"{error.message} {error.details}"
    assert not any(part in told for part in ("bomb", "jane", "example.org"))


@EVERY
async def test_a_refusal_is_told_of_once(
    make: Callable[[], InputCheck], guardrail: str, category: str
) -> None:
    events: list[Event] = []
    inquiry = Inquiry(tenant="acme", emit=events.append)
    with pytest.raises(InvalidInput):
        await Guard(checks=(make(),)).prompt(SECRET, inquiry)
    assert events == [
        GuardrailActed(
            guardrail=guardrail,
            category=category,
            done=Done.REFUSED,
            way=Way.INPUT,
            tenant="acme",
        )
    ]


@pytest.mark.parametrize("padding", ["", "x " * OFF_LOOP])
async def test_masks_are_counted(padding: str) -> None:
    events: list[Event] = []
    guard = Guard(checks=(screening(Action.MASK),), screen=screening(Action.MASK).screen)
    inquiry = Inquiry(emit=events.append)
    talk = (
        ChatMessage(role="user", content=f"a@b.co {padding} c@d.co"),
        ChatMessage(role="user", content="x"),
    )
    await guard.prompt(Conversation(talk), inquiry)
    [output] = guard.output(1, inquiry)
    for delta in (
        Delta(text="a@b"),
        Delta(text=".co and "),
        Delta(text="c@d.co, "),
        Delta(text="e@f.co", finish_reason=FinishReason.STOP),
    ):
        output.shown(delta)
    told = [(e.done, e.way, e.times) for e in events if isinstance(e, GuardrailActed)]
    assert told == [(Done.MASKED, Way.INPUT, 2), *[(Done.MASKED, Way.OUTPUT, 1)] * 3]


async def test_an_answer_that_is_ended_is_told_of() -> None:
    events: list[Event] = []
    guard = Guard(screen=screening(Action.REFUSE).screen)
    [output] = guard.output(1, Inquiry(tenant="acme", emit=events.append))
    output.shown(Delta(text="a@b.co and more"))
    assert events == [
        GuardrailActed(
            guardrail="pii", category="email", done=Done.REFUSED, way=Way.OUTPUT, tenant="acme"
        )
    ]


async def test_personal_data_is_masked_before_a_model_is_asked() -> None:
    embedder = AlarmedEmbedder()
    asked = Safety(config=SafetyConfig(model="m"), head=HEAD, embedder=lambda name: embedder)
    guard = Guard(checks=(screening(Action.MASK),), prompt_checks=(asked,))
    assert await guard.prompt("I am a@b.co") == "I am [EMAIL]"
    assert embedder.texts == ["I am [EMAIL]"]


async def test_texts_that_ask_for_nothing_are_not_asked_about() -> None:
    guard = Guard(prompt_checks=(safety(),))
    assert await guard.each(["a bomb"], param="input") == ["a bomb"]
    assert await guard.value({"text": "a bomb"}, param="inputs[0]") == {"text": "a bomb"}


async def test_token_ids_cannot_slip_through_a_check_that_asks_a_model() -> None:
    with pytest.raises(InvalidInput, match="cannot read token ids"):
        await Guard(prompt_checks=(safety(),)).prompt((1, 2))
