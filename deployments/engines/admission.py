"""What a request must satisfy before it may wait: a pure check, no queue and no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from deployments.engines.sequence import Call, Sequence
from models.contracts import Conversation, GenerateRequest, Prompt, Sampling
from models.errors import InvalidInput, Underestimated

MAX_LOGPROBS = 20
MAX_BIAS = 100.0
RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
"""What the sampler computes with in every precision; the gateway may allow less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one model can serve."""

    context: int
    """Tokens of prompt and output together."""
    vocabulary: int
    max_choices: int


def admit(
    request: GenerateRequest, prompt: tuple[int, ...], limits: Limits, *, arrived: float
) -> Call:
    """A request and its prompt's tokens → the call that the scheduler knows.

    Raises:
        InvalidInput: naming the field, what was given and what is possible.
        Underestimated: the prompt has more tokens than were reserved for it.
    """
    sampling = request.sampling
    _check_sampling(sampling, limits.vocabulary)
    if not 1 <= request.n <= limits.max_choices:
        raise InvalidInput(
            f"n is {request.n}; this model gives 1 to {limits.max_choices} choices.", param="n"
        )
    room = _room(prompt, limits, prompt_field(request.prompt))
    if sampling.max_tokens is not None and not 1 <= sampling.max_tokens <= room:
        raise InvalidInput(
            f"max_tokens is {sampling.max_tokens}; behind a prompt of {len(prompt)} tokens the"
            f" context of {limits.context} leaves 1 to {room}.",
            param="max_tokens",
            details={"prompt_tokens": len(prompt), "context": limits.context},
        )
    if request.max_prompt_tokens is not None and len(prompt) > request.max_prompt_tokens:
        raise Underestimated(
            f"The prompt has {len(prompt)} tokens, and {request.max_prompt_tokens} were reserved.",
            details={"prompt_tokens": len(prompt)},
        )
    due = float("inf") if request.timeout_s is None else arrived + request.timeout_s
    call = Call(request=request, prompt=prompt, arrived=arrived, deadline=due)
    length = sampling.max_tokens or min(room, sampling.token_cap or room)
    call.sequences = [
        Sequence(call=call, index=i, max_tokens=length, tokens=list(prompt))
        for i in range(request.n)
    ]
    return call


def prompt_field(prompt: Prompt) -> str:
    """What a client calls it: a conversation is sent as messages."""
    return "messages" if isinstance(prompt, Conversation) else "prompt"


def _room(prompt: tuple[int, ...], limits: Limits, field: str) -> int:
    """How many new tokens the context has place for."""
    if not prompt:
        raise InvalidInput("The prompt is empty; send at least one token.", param=field)
    check_tokens(field, prompt, limits.vocabulary)
    room = limits.context - len(prompt)
    if room < 1:
        raise InvalidInput(
            f"The prompt has {len(prompt)} tokens; with at least one new token the model's"
            f" context of {limits.context} holds {limits.context - 1}. Shorten the prompt.",
            param=field,
            details={"prompt_tokens": len(prompt), "context": limits.context},
        )
    return room


def _check_sampling(sampling: Sampling, vocabulary: int) -> None:
    for field, (low, high) in RANGES.items():
        value = getattr(sampling, field)
        if not low <= value <= high:  # a NaN is in no range
            raise InvalidInput(f"{field} is {value}; it can be {low} to {high}.", param=field)
    check_tokens("logit_bias", sampling.logit_bias, vocabulary)
    for token, bias in sampling.logit_bias.items():
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise InvalidInput(
                f"logit_bias of token {token} is {bias}; it can be {-MAX_BIAS} to {MAX_BIAS}.",
                param="logit_bias",
            )
    most = min(vocabulary, MAX_LOGPROBS)
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= most:
        raise InvalidInput(
            f"logprobs asks for {sampling.logprobs} alternatives; 0 to {most} are given.",
            param="logprobs",
        )
    if "" in sampling.stop:
        raise InvalidInput(
            "stop has an empty string; each needs at least one character.", param="stop"
        )
    check_tokens("stop_token_ids", sampling.stop_token_ids, vocabulary)


def check_tokens(field: str, tokens: Iterable[int], vocabulary: int) -> None:
    """Raises :class:`InvalidInput` naming the first that the vocabulary does not have."""
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InvalidInput(
                f"{field} has token {token}; this model's tokens are 0 to {vocabulary - 1}.",
                param=field,
            )
