"""What the engine knows of one request and of each of its continuations."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from deployments.engines.queue import Ticket
from models.contracts import GenerateRequest, TokenLogprob, Usage

if TYPE_CHECKING:
    from deployments.engines.adapters import Adapter
    from deployments.engines.grammar import Constraint


@dataclass(eq=False, slots=True)
class Call:
    """One request inside the engine: its prompt in tokens and its ``n`` sequences.

    Times are those of the engine's clock, in seconds; ``None`` until they happen.
    """

    request: GenerateRequest
    prompt: tuple[int, ...]
    arrived: float
    deadline: float
    """When the whole answer is due."""
    adapter: Adapter | None = None
    """In memory while the call lives. Keys and values depend on it."""
    constraint: Constraint | None = None
    """At the beginning of the answer's grammar."""
    ticket: Ticket[Call] | None = None
    sequences: list[Sequence] = field(default_factory=list)
    started: float | None = None
    preempted: bool = False
    """Made room once, and computes anew what it had. It will not have to again."""
    first_token: float | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """As far as the prompt has been read in, where they are wanted."""
    account: Future[Usage] | None = None
    """Of a request that is to be billed: what was done for it, once it is over."""

    @property
    def usage(self) -> Usage:
        """So far. A prompt that was begun counts as a whole."""
        return Usage(
            prompt_tokens=0 if self.started is None else len(self.prompt),
            completion_tokens=sum(sequence.generated for sequence in self.sequences),
            cached_tokens=self.cached_tokens,
        )

    @property
    def wants_prompt_logprobs(self) -> bool:
        sampling = self.request.sampling
        return sampling.prompt_logprobs and sampling.logprobs is not None

    @property
    def done(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)


@dataclass(eq=False, slots=True)
class Sequence:
    """One continuation. ``tokens`` is the prompt and what was drawn so far.

    ``computed`` counts the leading tokens whose keys and values lie in ``slot``. While a
    sequence runs it owns its slot alone; ``computed == len(tokens) - 1`` means that it
    decodes, less that it still prefills.
    """

    call: Call
    index: int
    max_tokens: int
    tokens: list[int]
    slot: int | None = None
    computed: int = 0
    finished: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.call.prompt)

    @property
    def tells_prompt(self) -> bool:
        """Whether it computes how likely its prompt was, for all choices of its call."""
        return self.index == 0 and self.call.wants_prompt_logprobs

    @property
    def generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Keys and values of the first ``length`` tokens, from one slot to another."""

    source: int
    target: int
    length: int
    wipe: bool = False
    """Leave nothing of it behind: no finite logits have vouched for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Keys and values of kept blocks, to the beginning of a slot."""

    blocks: tuple[int, ...]
    target: int


Move: TypeAlias = Copy | Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Keys and values of a slot's tokens from ``start`` on, to blocks that keep them."""

    slot: int
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The next tokens of one sequence to run through the model in this step."""

    sequence: Sequence
    slot: int
    start: int
    """Position of the first of ``tokens``; everything before it lies in the slot."""
    tokens: tuple[int, ...]
    samples: bool
    """Whether the last token's logits are wanted, to draw the next one."""
    predicts: int = 0
    """How many of the first tokens' logits are wanted, to tell how likely the prompt's next ones
    were."""

    @property
    def decodes(self) -> bool:
        """Whether this is the one token that was drawn last."""
        return self.samples and len(self.tokens) == 1 and self.start >= self.sequence.prompt_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass."""

    moves: tuple[Move, ...] = ()
    """Made before it, in this order: what one reads, a later one may write over."""
    chunks: tuple[Chunk, ...]

    @property
    def written(self) -> frozenset[int]:
        """Slots whose contents are other ones afterwards."""
        return frozenset(
            [
                *(move.target for move in self.moves),
                *(chunk.slot for chunk in self.chunks),
            ]
        )

    @property
    def prefill_tokens(self) -> int:
        """Of prompts, and of what is computed anew."""
        return sum(len(c.tokens) for c in self.chunks) - self.decode_tokens

    @property
    def decode_tokens(self) -> int:
        return sum(c.decodes for c in self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the scheduler has decided for the next step."""

    step: Step | None
    """``None``: there is nothing to compute."""
    started: tuple[Call, ...] = ()
    """Calls that join the batch for the first time."""
    preempted: tuple[Call, ...] = ()
    """Calls that made room, and wait again."""
