"""What every model speaks: two protocols and the frozen messages that cross them.

Everything here is plain data: no torch, no Ray, no HTTP. A message is built once, by
us, from validated input; it is immutable and cheap to pickle.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"


class Priority(StrEnum):
    """Named classes (spec B2), never numbers: peers disagree on which end is high."""

    VIP = "vip"
    STANDARD = "standard"
    LOW = "low"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Whom a call is for and how long it may take: all that decides whose turn it is."""

    tenant: str = "public"
    weight: int = 1
    """Of the tenant's share, beside others of the same priority."""
    priority: Priority = Priority.STANDARD
    timeout_s: float | None = None
    """From now; ``None``: as long as its priority may wait."""


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """``max_tokens`` or the end of the model's context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """What a model has asked of its caller."""

    id: str
    name: str
    arguments: str
    """A JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant."""
    tool_call_id: str | None = None
    """Of role ``tool``: the call whose result the content is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may ask its caller to call."""

    name: str
    description: str | None
    parameters: str
    """The JSON schema of its arguments, as JSON."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the model's own chat template renders."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()


Prompt: TypeAlias = "str | tuple[int, ...] | Conversation"
"""Text, token ids, or a conversation."""


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"
    TOOL_CALLS = "tool_calls"
    """Calls as ``models.tool_calls`` writes them."""


class Grammar(NamedTuple):
    """What an answer has to be, from its first character to its last."""

    kind: GrammarKind
    text: str
    """A JSON schema as JSON, a regular expression, a grammar in Lark's language, or what
    ``models.tool_calls.Allowed`` writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one continuation is drawn. Defaults draw from the model's own distribution.

    Penalties are applied in the order repetition (Keskar et al. 2019, over prompt and
    output), then frequency and presence (OpenAI's definition, over the output); then
    ``logit_bias``, temperature, ``top_k``, ``top_p``, ``min_p``.
    """

    max_tokens: int | None = None
    """New tokens at most; ``None``: up to the end of the context."""
    token_cap: int | None = None
    """What ``max_tokens`` that is left open ends at, where the context has room for so many."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    """The same seed gives the same tokens, whatever else runs in the batch."""
    logprobs: int | None = None
    """``None``: none; ``k``: the chosen token's, and the ``k`` likeliest beside it."""
    prompt_logprobs: bool = False
    """The same of the prompt's tokens, where ``logprobs`` are asked for."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    """Tokens with which the answer would leave it are never drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One call: a prompt and ``n`` continuations of it."""

    id: str
    model: str
    prompt: Prompt
    adapter: str | None = None
    """Of ``model``: what follows the colon of ``smollm2:NAME[@VERSION_OR_ALIAS]``."""
    sampling: Sampling = Sampling()
    n: int = 1
    stream: bool = False
    """False: the caller wants nothing before the end, so only one delta a choice is sent."""
    tenant: str = "public"
    weight: int = 1
    """Of the tenant's share beside others of the same priority."""
    priority: Priority = Priority.STANDARD
    timeout_s: float | None = None
    """Seconds from arrival at the engine until the whole answer must be there."""
    max_prompt_tokens: int | None = None
    """What was reserved for the prompt: one that is longer is not begun (``Underestimated``)."""
    receipt: str | None = None
    """A name that no other request has, under which the engine can be asked what it has done of
    this one, should it be closed before its end (``Accountable``)."""
    tell_place: bool = False
    """Tell where it stands while it waits, if it is streamed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopLogprob:
    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Natural logarithms, of the model's distribution before temperature and truncation."""

    token_id: int
    token: str
    logprob: float | None
    """``None``: of a prompt's first token, which nothing comes before."""
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    """Summed over the ``n`` choices."""
    cached_tokens: int = 0
    """Prompt tokens whose keys and values were reused instead of computed."""


NO_USAGE = Usage(prompt_tokens=0, completion_tokens=0)


def sum_of(usages: Iterable[Usage]) -> Usage:
    prompt = completion = cached = 0
    for usage in usages:
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        cached += usage.cached_tokens
    return Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a request's time went inside the engine, in seconds."""

    queue_s: float
    """Arrival to joining the batch."""
    prefill_s: float
    """Joining the batch to the first token."""
    ttft_s: float
    """Arrival to the first token: queue and prefill."""
    decode_s: float
    """First token to the last."""
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a request stands while it waits."""

    position: int
    """1: it is the next."""
    waiting: int
    """All that wait, of every priority."""
    wait_s: float | None
    """At the rate that was measured; ``None``: none was yet."""


class Versions(NamedTuple):
    """What answered, as the accounts name it; ``answered_by`` is for machines."""

    model: str | None = None
    """NAME@VERSION in the registry, or a source that never changes; ``None``: it has no version."""
    adapter: str | None = None
    """NAME@VERSION; ``None``: the model answered by itself."""


NO_VERSIONS = Versions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New output of one choice since the last delta of that choice.

    ``text`` never ends in half a character and never contains a stop string. The last
    delta of a choice has ``finish_reason``; the last of the whole request also has
    ``usage`` and ``timings``.
    """

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt: tuple[TokenLogprob, ...] | None = None
    """With the first delta of a choice, where ``prompt_logprobs`` are asked for."""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    answered_by: str | None = None
    """Of the last delta: a name for exactly what answered, weights and adapter and all that an
    answer depends on; ``None``: it cannot be told."""
    versions: Versions | None = None
    """Of the first delta that is output."""
    place: Place | None = None
    """Before any output; then nothing else is told."""


class Generator(Protocol):
    """Engines and providers alike."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """Yield deltas until every choice has finished.

        Closing the iterator cancels the request and frees what it holds.

        Raises:
            models.errors.PlatformError: ``InvalidInput`` before the first delta for a
                request that cannot be served, ``Overloaded`` when the queue is full,
                ``Timeout`` when a deadline passes, ``UpstreamError`` or
                ``InternalError`` when the work failed.
        """
        ...


@runtime_checkable
class Accountable(Protocol):
    """A generator that remembers what it did for requests that were closed early."""

    async def spent(self, request: GenerateRequest) -> Usage | None:
        """What was done of a request with a ``receipt`` until it was closed, in full.

        Of one that never began to be computed: nothing. ``None``: that cannot be told, because
        whoever did it is gone, or does not answer.
        """
        ...


@runtime_checkable
class Tokenizes(Protocol):
    """A generator that tells how it reads text; no adapter reads otherwise than its model."""

    async def tokenize(self, prompt: Prompt) -> Sequence[int]:
        """What ``generate`` would read for this prompt.

        Raises:
            models.errors.InvalidInput: as ``Generator.generate``, but for its length.
        """
        ...

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Their text, special tokens included.

        Raises:
            models.errors.InvalidInput: naming a token that the model does not have.
        """
        ...


class Predictor(Protocol):
    """A fixed-cost model: embeddings, classifiers, forecasts, policies."""

    def predict_batch(self, inputs: Sequence[Json]) -> Sequence[Json]:
        """One output per input, in order, independent of what else is in the batch.

        Raises:
            models.errors.InvalidInput: naming the index of the input at fault.
        """
        ...
