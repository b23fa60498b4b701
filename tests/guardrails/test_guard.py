"""From the configuration to what it does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import GatewayConfig, GuardrailsConfig, PlanConfig, parse
from deployments.guardrails.checks import OFF_LOOP
from deployments.guardrails.guard import OPEN, Guard, Guardrails
from models.contracts import (
    ChatMessage,
    Conversation,
    Delta,
    FinishReason,
    Sampling,
    TokenLogprob,
    Tool,
    ToolCall,
)
from models.errors import ConfigError, InvalidInput

ROOT = Path(__file__).parents[2]
MODEL = {"m": {"task": "generate", "source": "./model"}}


def guard(**guardrails: Any) -> Guard:
    config = GatewayConfig(guardrails=GuardrailsConfig.model_validate(guardrails))
    return Guardrails.of(config).of_plan(None)


def test_nothing_is_checked_unless_somebody_says_so() -> None:
    guardrails = Guardrails.of(GatewayConfig())
    for plan in (None, "free", "pro", "enterprise", "unknown"):
        found = guardrails.of_plan(plan)
        assert (found.checks, found.screen) == ((), None)
        assert found.sampling(Sampling(logprobs=3), Sampling()) == Sampling(logprobs=3)
        assert found.output(3) == ()


async def test_an_open_guard_lets_everything_through() -> None:
    for prompt in ("a@b.co", (1, 2), Conversation((ChatMessage(role="user", content="x"),))):
        assert await OPEN.prompt(prompt) == prompt
    assert await OPEN.value({"a": ["a@b.co", 1]}, param="x") == {"a": ["a@b.co", 1]}
    assert await OPEN.each(["a@b.co"], param="input") == ["a@b.co"]


async def test_a_plan_has_guardrails_and_caps_of_its_own() -> None:
    config = GatewayConfig.model_validate(
        {
            "guardrails": {"max_prompt_chars": 10},
            "plans": {
                "free": {"max_new_tokens": 5, "max_temperature": 0.5},
                "pro": {"guardrails": {"max_prompt_chars": 20}},
            },
        }
    )
    guardrails = Guardrails.of(config)
    for plan, allowed in ((None, 10), ("free", 10), ("pro", 20)):
        assert await guardrails.of_plan(plan).prompt("x" * allowed) == "x" * allowed
        with pytest.raises(InvalidInput, match=f"has {allowed + 1} characters; {allowed} are"):
            await guardrails.of_plan(plan).prompt("x" * (allowed + 1))
    assert guardrails.of_plan("free").caps.max_new_tokens == 5
    assert guardrails.of_plan("pro").caps.max_new_tokens is None


def test_caps_are_no_counted_limits() -> None:
    plan = PlanConfig(requests_per_minute=3, max_new_tokens=5, max_temperature=0.5)
    assert set(dict(plan.limits)) == {
        "requests_per_minute",
        "requests_per_hour",
        "requests_per_day",
        "tokens_per_minute",
        "tokens_per_day",
        "concurrent_requests",
        "budget_per_month",
    }


async def test_the_length_is_of_all_messages() -> None:
    talk = Conversation(tuple(ChatMessage(role="user", content="x" * 6) for _ in range(2)))
    with pytest.raises(InvalidInput, match="has 12 characters") as refused:
        await guard(max_prompt_chars=11).prompt(talk)
    assert refused.value.details["guardrail"] == "prompt_length"


async def test_messages_keep_their_roles() -> None:
    hi = ChatMessage(role="user", content="hi")
    talk = Conversation((ChatMessage(role="system", content="Serve a@b.co."), hi))
    checked = await guard(pii={"email": {"input": "mask"}}).prompt(talk)
    assert checked == Conversation((ChatMessage(role="system", content="Serve [EMAIL]."), hi))


async def test_tools_and_calls_are_looked_at_too() -> None:
    def talk(address: str) -> Conversation:
        call = ToolCall(id="1", name="find", arguments=f'{{"who": "{address}"}}')
        tool = Tool(
            name="find", description=f"Of {address}.", parameters=f'{{"const": "{address}"}}'
        )
        return Conversation(
            (
                ChatMessage(role="assistant", content=address, tool_calls=(call, call)),
                ChatMessage(role="tool", content=f"It is {address}.", tool_call_id="1"),
            ),
            (tool, replace(tool, description=None)),
        )

    checked = await guard(pii={"email": {"input": "mask"}}).prompt(talk("a@b.co"))
    assert checked == talk("[EMAIL]")


@pytest.mark.parametrize("padding", [0, OFF_LOOP])
async def test_a_refusal_never_tells_what_it_found(padding: int) -> None:
    secret = "4111 1111 1111 1111"
    with pytest.raises(InvalidInput) as refused:
        await guard(pii={"card": {"input": "refuse"}}).prompt("x " * padding + secret)
    error = refused.value
    assert error.details == {"guardrail": "pii", "category": "card"}
    assert secret not in f"{error} {error.message} {error.details}"


async def test_token_ids_cannot_slip_through() -> None:
    with pytest.raises(InvalidInput, match="cannot read token ids"):
        await guard(pii={"card": {"input": "refuse"}}).prompt((1, 2))
    assert await guard(pii={"card": {"output": "refuse"}}).prompt((1, 2)) == (1, 2)


async def test_texts_in_a_json_value() -> None:
    value = {"a@b.co": ["a@b.co", {"x": "c@d.co", "n": 1.5}, None], "ok": True}
    assert await guard(pii={"email": {"input": "mask"}}).value(value, param="inputs[0]") == {
        "a@b.co": ["[EMAIL]", {"x": "[EMAIL]", "n": 1.5}, None],
        "ok": True,
    }
    with pytest.raises(InvalidInput) as refused:
        await guard(pii={"email": {"input": "refuse"}}).value(value, param="inputs[3]")
    assert refused.value.param == "inputs[3]"


def test_logprobs_of_an_answer_that_is_masked_are_refused() -> None:
    with pytest.raises(InvalidInput) as refused:
        guard(pii={"ip": {"output": "mask"}}).sampling(Sampling(logprobs=0), Sampling())
    assert refused.value.param == "logprobs"
    guard(pii={"ip": {"input": "mask"}}).sampling(Sampling(logprobs=0), Sampling())


def test_token_ids_and_logprobs_of_an_answer_do_not_get_out() -> None:
    [output] = guard(pii={"ip": {"output": "mask"}}).output(1)
    logprobs = (TokenLogprob(token_id=1, token="8.8", logprob=-1.0),)
    delta = Delta(text="at 8.8", token_ids=(1,), logprobs=logprobs)
    assert output.shown(delta) == (Delta(text="at "), None)
    assert output.shown(Delta(text=".8.8")) == (None, None)
    last = Delta(text="!", token_ids=(2,), finish_reason=FinishReason.STOP)
    assert output.shown(last) == (Delta(text="[IP]!", finish_reason=FinishReason.STOP), None)


def test_every_choice_is_read_on_its_own() -> None:
    first, second = guard(pii={"email": {"output": "refuse"}}).output(2)
    assert first.shown(Delta(text="a@b")) == (None, None)
    assert second.shown(Delta(index=1, text="fine ")) == (Delta(index=1, text="fine "), None)
    shown, refused = first.shown(Delta(text=".co "))
    assert shown is None
    assert refused is not None
    assert refused.details == {"guardrail": "pii", "category": "email"}


@pytest.mark.parametrize(
    ("guardrails", "words"),
    [
        ({"pii": {"emial": {}}}, "'email', 'card'"),
        ({"pii": {"email": {"input": "hide"}}}, "'allow', 'mask' or 'refuse'"),
        ({"categories": {"Bad": {"words": ["x"]}}}, "pattern"),
        ({"categories": {"bad": {}}}, "expected words, patterns, or both"),
        ({"categories": {"bad": {"words": [" "]}}}, "pattern"),
        ({"categories": {"bad": {"patterns": ["("]}}}, "not a regular expression"),
        ({"categories": {"bad": {"patterns": ["a(?!b)"]}}}, "a look-around"),
        ({"categories": {"bad": {"patterns": ["a.*b"]}}}, "may match 256 characters at most"),
        ({"categories": {"bad": {"patterns": ["(a{999}){999}"], "output": "allow"}}}, "too large"),
        ({"max_prompt_chars": 0}, "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_named(guardrails: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse({"models": MODEL, "gateway": {"guardrails": guardrails}})
    assert "gateway.guardrails" in refusal.value.message
    assert words in refusal.value.message


async def test_a_pattern_for_input_alone_may_be_of_any_length() -> None:
    blocked = guard(categories={"bad": {"patterns": ["a.*b"], "output": "allow"}})
    with pytest.raises(InvalidInput) as refused:
        await blocked.prompt("a" + "x" * 1000 + "b")
    assert refused.value.details == {"guardrail": "blocked", "category": "bad"}


def test_the_example_in_the_documentation_is_right() -> None:
    document = (ROOT / "docs" / "guardrails.md").read_text()
    example = yaml.safe_load(document.split("```yaml\n")[1].split("```")[0])
    config = parse({"models": MODEL, **example})
    assert config.gateway.guardrails.categories
    assert parse(config.model_dump(mode="json")) == config  # as it travels to the replicas
    Guardrails.of(config.gateway)


def test_categories_that_are_too_large_together() -> None:
    """Each one alone is not."""
    patterns = [f"[{letter}x]{{1000}}" * 20 for letter in "abcdefgh"]
    categories = {f"c{number}": {"patterns": patterns, "output": "allow"} for number in range(20)}
    guard(categories={"c0": categories["c0"]})
    with pytest.raises(ConfigError, match="the categories together are too large"):
        guard(categories=categories)
