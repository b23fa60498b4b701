"""The guardrails of each plan, made once from the configuration, as the gateway asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

from deployments.config import GatewayConfig, GuardrailsConfig, PlanConfig
from deployments.guardrails import blocked
from deployments.guardrails.caps import Caps
from deployments.guardrails.checks import InputCheck, Inquiry, Length, Screening, refusal
from deployments.guardrails.kinds import Action, Way
from deployments.guardrails.pii import RULES
from deployments.guardrails.rules import Rule
from deployments.guardrails.safety.check import Safety
from deployments.guardrails.safety.head import Head
from deployments.guardrails.screen import Masker, Screen
from models.contracts import Conversation, Delta, Json, Prompt, Sampling
from models.errors import ConfigError, InvalidInput

if TYPE_CHECKING:  # the gateway's services make the guardrails
    from deployments.gateway.services import Embedder


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    caps: Caps = field(default_factory=Caps)
    checks: tuple[InputCheck, ...] = ()
    """Of what goes in, in this order; each sees what the one before lets through."""
    prompt_checks: tuple[InputCheck, ...] = ()
    """Those after them, of what a model is to answer: texts to embed ask for nothing."""
    screen: Screen | None = None
    """Of what comes out."""

    def sampling(
        self, asked: Sampling, default: Sampling, inquiry: Inquiry | None = None
    ) -> Sampling:
        """``asked``, within the caps of the plan.

        Raises:
            InvalidInput: more than the plan allows; or logprobs of an answer that is masked,
                which would show the tokens under the mask.
        """
        try:
            return self._sampling(asked, default)
        except InvalidInput as error:
            (inquiry or Inquiry()).tell_refused(error)
            raise

    def _sampling(self, asked: Sampling, default: Sampling) -> Sampling:
        if self.screen is not None and asked.logprobs is not None:
            raise InvalidInput(
                "logprobs show tokens that the guardrails of the output may hide; leave it out.",
                param="logprobs",
                details={"guardrail": "output", "category": "logprobs"},
            )
        return self.caps.hold(asked, default)

    async def prompt(self, prompt: Prompt, inquiry: Inquiry | None = None) -> Prompt:
        """What the model may see of ``prompt``; ``inquiry`` then says which model that is.

        Raises:
            InvalidInput: nothing, by one of the checks; or token ids, which nobody here can read.
            Unavailable: a check that asks a model gets no answer.
        """
        checks, inquiry = (*self.checks, *self.prompt_checks), inquiry or Inquiry()
        if not checks:
            return prompt
        if isinstance(prompt, str):
            [text] = await _through(checks, [prompt], inquiry, "prompt")
            return text
        if not isinstance(prompt, Conversation):
            unread = InvalidInput(
                "The guardrails cannot read token ids; send the prompt as text.",
                param="prompt",
                details={"guardrail": "prompt", "category": "token_ids"},
            )
            inquiry.tell_refused(unread)
            raise unread
        said = list(_said(prompt))
        texts = await _through(checks, said, inquiry, "messages")
        return prompt if texts == said else _with_said(prompt, iter(texts))

    async def each(
        self, texts: Sequence[str], *, param: str, inquiry: Inquiry | None = None
    ) -> list[str]:
        """What a model may see of inputs that are one text each.

        Raises:
            InvalidInput: nothing, by one of the checks; ``param`` is the field at fault.
        """
        if not self.checks:
            return list(texts)
        inquiry = inquiry or Inquiry()
        return [(await _through(self.checks, [text], inquiry, param))[0] for text in texts]

    async def value(self, value: Json, *, param: str, inquiry: Inquiry | None = None) -> Json:
        """The same of the texts in a JSON value; the names of fields are the model's, and stay."""
        if not self.checks or not (texts := list(_texts(value))):
            return value
        seen = await _through(self.checks, texts, inquiry or Inquiry(), param)
        return _with_texts(value, iter(seen))

    def output(self, choices: int, inquiry: Inquiry | None = None) -> Sequence[Output]:
        """One for each choice of an answer; empty: nothing is to be looked at."""
        if self.screen is None:
            return ()
        return [Output(self.screen, inquiry or Inquiry()) for _ in range(choices)]


class Output:
    """One choice on its way to the client."""

    def __init__(self, screen: Screen, inquiry: Inquiry) -> None:
        self._masker = Masker(screen)
        self._inquiry = inquiry

    def shown(self, delta: Delta) -> tuple[Delta | None, InvalidInput | None]:
        """What the client may see of a delta, if there is anything; and why there is no more.

        Token ids and logprobs go: they say what is under a mask.
        """
        last = delta.finish_reason is not None
        text = self._masker.push(delta.text, last=last)
        if self._masker.masked:
            self._inquiry.tell_masked(self._masker.masked, Way.OUTPUT)
            self._masker.masked = []
        if (rule := self._masker.refused) is not None:
            refused = refusal(rule, "The answer was ended")
            self._inquiry.tell_refused(refused, Way.OUTPUT)
            return (Delta(index=delta.index, text=text) if text else None), refused
        if not text and not last:
            return None, None
        return replace(delta, text=text, token_ids=(), logprobs=None, prompt=None), None


Embedders: TypeAlias = "Callable[[str], Embedder]"
OPEN = Guard()
"""Lets everything through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guardrails:
    default: Guard = OPEN
    """For whoever has no plan."""
    plans: Mapping[str, Guard] = field(default_factory=dict)

    @classmethod
    def of(cls, config: GatewayConfig, embedder: Embedders | None = None) -> Guardrails:
        """Args:
            embedder: finds the worker behind a model, for the check that asks one.

        Raises:
            ConfigError: the categories together are too much for RE2; or a check asks a model, and
                there are none.
        """
        default = _guard(config.guardrails, Caps(), embedder)
        plans = {
            name: _of_plan(name, plan, default, embedder) for name, plan in config.plans.items()
        }
        return cls(default=default, plans=plans)

    def of_plan(self, plan: str | None) -> Guard:
        return self.default if plan is None else self.plans.get(plan, self.default)


def _of_plan(name: str, plan: PlanConfig, default: Guard, embedder: Embedders | None) -> Guard:
    caps = Caps(plan=name, max_new_tokens=plan.max_new_tokens, max_temperature=plan.max_temperature)
    if plan.guardrails is None:
        return replace(default, caps=caps)
    return _guard(plan.guardrails, caps, embedder)


def _guard(config: GuardrailsConfig, caps: Caps, embedder: Embedders | None) -> Guard:
    entering, leaving = [], []
    for rule, entry, exit_ in _rules(config):
        entering.append((rule, entry))
        leaving.append((rule, exit_))
    checks: list[InputCheck] = []
    if config.max_prompt_chars is not None:
        checks.append(Length(config.max_prompt_chars))
    if (screen := _screen(entering)) is not None:
        checks.append(Screening(screen))
    prompt_checks: list[InputCheck] = []
    if config.safety is not None:
        if embedder is None:
            raise ConfigError("guardrails.safety asks a model that embeds; here there is none")
        prompt_checks.append(Safety(config=config.safety, head=Head.load(), embedder=embedder))
    return Guard(
        caps=caps,
        checks=tuple(checks),
        prompt_checks=tuple(prompt_checks),
        screen=_screen(leaving),
    )


def _screen(rules: Sequence[tuple[Rule, Action]]) -> Screen | None:
    active = [pair for pair in rules if pair[1] is not Action.ALLOW]
    if not active:
        return None
    try:
        return Screen(active)
    except ValueError as error:
        raise ConfigError(
            f"guardrails: the categories together are too large; shorten them ({error})"
        ) from None


def _rules(config: GuardrailsConfig) -> Iterator[tuple[Rule, Action, Action]]:
    """With what to do about each on the way in and on the way out; refusals come first."""
    for name, category in config.categories.items():
        for rule in blocked.rules(name, category.words, category.patterns):
            yield rule, category.input, category.output
    for kind, rules in RULES.items():
        if (on := config.pii.get(kind)) is not None:
            for rule in rules:
                yield rule, on.input, on.output


async def _through(
    checks: Sequence[InputCheck], texts: Sequence[str], inquiry: Inquiry, param: str
) -> Sequence[str]:
    """What the last check lets through. Raises as they do; ``param`` is the field at fault."""
    try:
        for check in checks:
            texts = await check(texts, inquiry)
    except InvalidInput as error:
        error.param = error.param or param
        inquiry.tell_refused(error)
        raise
    return texts


def _said(conversation: Conversation) -> Iterator[str]:
    """All that a client has put into it, but for names."""
    for message in conversation.messages:
        yield message.content
        for call in message.tool_calls:
            yield call.arguments
    for tool in conversation.tools:
        if tool.description is not None:
            yield tool.description
        yield tool.parameters


def _with_said(conversation: Conversation, texts: Iterator[str]) -> Conversation:
    """``conversation`` with its texts exchanged, in the order of ``_said``."""
    messages = [
        replace(
            message,
            content=next(texts),
            tool_calls=tuple([replace(c, arguments=next(texts)) for c in message.tool_calls]),
        )
        for message in conversation.messages
    ]
    tools = [
        replace(
            tool,
            description=None if tool.description is None else next(texts),
            parameters=next(texts),
        )
        for tool in conversation.tools
    ]
    return Conversation(tuple(messages), tuple(tools))


def _texts(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)


def _with_texts(value: Json, texts: Iterator[str]) -> Json:
    """``value`` with its texts exchanged, in the order of ``_texts``."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, list):
        return [_with_texts(item, texts) for item in value]
    if isinstance(value, dict):
        return {name: _with_texts(item, texts) for name, item in value.items()}
    return value
