"""What a request must satisfy before it may wait: a pure check, no queue and no model."""

from __future__ import annotations

from collections.abc import Iterable

from deployments.engines.sequence import Call, Sequence
from models.contracts import GenerateRequest
from models.errors import InvalidInput


def admit(
    request: GenerateRequest,
    prompt: tuple[int, ...],
    *,
    context: int,
    vocabulary: int,
    max_choices: int,
    arrived: float,
) -> Call:
    """A request and its prompt's tokens → the call that the scheduler knows.

    Raises:
        InvalidInput: naming the field, what was given and what is possible.
    """
    sampling = request.sampling
    if not prompt:
        raise InvalidInput("The prompt is empty; send at least one token.", param="prompt")
    _check_tokens("prompt", prompt, vocabulary)
    _check_tokens("logit_bias", sampling.logit_bias, vocabulary)
    _check_tokens("stop_token_ids", sampling.stop_token_ids, vocabulary)
    if not 1 <= request.n <= max_choices:
        raise InvalidInput(
            f"n is {request.n}; this model gives 1 to {max_choices} choices.", param="n"
        )
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= min(vocabulary, 20):
        raise InvalidInput(
            f"logprobs asks for {sampling.logprobs} alternatives; 0 to 20 are given.",
            param="logprobs",
        )
    room = context - len(prompt)
    if room < 1:
        raise InvalidInput(
            f"The prompt has {len(prompt)} tokens; with at least one new token the model's"
            f" context of {context} holds {context - 1}. Shorten the prompt.",
            param="prompt",
            details={"prompt_tokens": len(prompt), "context": context},
        )
    if sampling.max_tokens is not None and not 1 <= sampling.max_tokens <= room:
        raise InvalidInput(
            f"max_tokens is {sampling.max_tokens}; behind a prompt of {len(prompt)} tokens the"
            f" context of {context} leaves 1 to {room}.",
            param="max_tokens",
            details={"prompt_tokens": len(prompt), "context": context},
        )
    due = float("inf") if request.timeout_s is None else arrived + request.timeout_s
    call = Call(request=request, prompt=prompt, arrived=arrived, deadline=due)
    call.sequences = [
        Sequence(call=call, index=i, max_tokens=sampling.max_tokens or room, tokens=list(prompt))
        for i in range(request.n)
    ]
    return call


def _check_tokens(field: str, tokens: Iterable[int], vocabulary: int) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise InvalidInput(
                f"{field} has token {token}; this model's tokens are 0 to {vocabulary - 1}.",
                param=field,
            )
