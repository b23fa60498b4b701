"""What docs/guardrails.md claims, of each kind by itself, through the guard as the gateway asks it:
on what goes in, and on what is streamed out in pieces that know nothing of words.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from functools import cache

import pytest
from faker import Faker

from deployments.config import GatewayConfig, GuardrailsConfig, PiiActions
from deployments.guardrails.guard import Guard, Guardrails
from deployments.guardrails.kinds import Action, PiiKind
from models.contracts import ChatMessage, Conversation, Delta, FinishReason
from tests.guardrails.test_pii import FRAMES, LOCALES, personal, without

OF_EACH_LOCALE = 40


@cache
def guard(*kinds: PiiKind) -> Guard:
    mask = PiiActions(input=Action.MASK, output=Action.MASK)
    config = GatewayConfig(guardrails=GuardrailsConfig(pii=dict.fromkeys(kinds, mask)))
    return Guardrails.of(config).of_plan(None)


async def entering(guard: Guard, text: str) -> str:
    conversation = await guard.prompt(Conversation((ChatMessage(role="user", content=text),)))
    assert isinstance(conversation, Conversation)
    [message] = conversation.messages
    return message.content


async def streamed(guard: Guard, text: str) -> str:
    """As tokens come: one to six characters at a time."""
    rng = random.Random(text)
    [output] = guard.output(1)
    shown, at = "", 0
    while at < len(text):
        step = rng.randint(1, 6)
        last = at + step >= len(text)
        delta, refused = output.shown(
            Delta(text=text[at : at + step], finish_reason=FinishReason.STOP if last else None)
        )
        assert refused is None
        shown += delta.text if delta is not None else ""
        at += step
    return shown


WAYS = {"input": entering, "streamed output": streamed}
EACH_WAY = pytest.mark.parametrize("through", WAYS.values(), ids=WAYS.keys())


def sentences(kind: PiiKind) -> Iterator[tuple[str, str]]:
    """With personal data of one kind, and as they should read."""
    for number, locale in enumerate(LOCALES):
        fake = Faker(locale)
        fake.seed_instance(31 * (1 + list(PiiKind).index(kind)) + number)
        for _ in range(OF_EACH_LOCALE):
            frame = f"{fake.sentence()} {fake.random_element(FRAMES[locale[:2]])}"
            yield frame.format(personal(fake, locale, kind)), frame.format(f"[{kind.upper()}]")


@EACH_WAY
@pytest.mark.parametrize("kind", PiiKind)
async def test_of_each_kind_nearly_all_is_found(
    through: Callable[[Guard, str], Awaitable[str]], kind: PiiKind
) -> None:
    made = list(sentences(kind))
    for looking_for in ((kind,), tuple(PiiKind)):
        missed = []
        for text, right in made:
            shown = await through(guard(*looking_for), text)
            if shown != right:
                missed.append((text, shown))
        assert 1 - len(missed) / len(made) >= 0.95, missed


@EACH_WAY
@pytest.mark.parametrize("kinds", [*((kind,) for kind in PiiKind), tuple(PiiKind)])
async def test_hardly_anything_else_is_touched(
    through: Callable[[Guard, str], Awaitable[str]], kinds: tuple[PiiKind, ...]
) -> None:
    made = list(without())
    wrong = []
    for text in made:
        shown = await through(guard(*kinds), text)
        if shown != text:
            wrong.append((text, shown))
    assert len(wrong) / len(made) <= 0.02, wrong
