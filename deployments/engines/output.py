"""What one sequence has made and not yet sent: tokens, their log-probabilities, their text."""

from __future__ import annotations

from collections.abc import Sequence as Items
from collections.abc import Set

from deployments.engines.sampler import Drawn, SamplerState
from deployments.engines.sequence import Sequence
from deployments.engines.text import TextCodec, TextStream
from models.contracts import Delta, FinishReason, Timings, TokenLogprob, TopLogprob, Usage


class Output:
    """From drawn tokens to deltas.

    Args:
        sequence: whose tokens they are.
        codec: gives their text.
        eos: tokens with which the model itself ends.
    """

    def __init__(self, sequence: Sequence, codec: TextCodec, eos: Set[int]) -> None:
        self._call = call = sequence.call
        sampling = call.request.sampling
        constraint = None if call.constraint is None else call.constraint.copy()
        self.sampler = SamplerState.start(sampling, call.prompt, sequence.index, constraint)
        self._index = sequence.index
        self._codec = codec
        self._text = TextStream(codec.decode, sampling.stop)
        self._stop_tokens = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos)}
        self._wants_logprobs = sampling.logprobs is not None
        self._tokens: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt = call.prompt_logprobs if call.wants_prompt_logprobs else None
        """To be told with the first of all deltas: the whole prompt has been read in by then."""
        if sequence.tells_prompt:
            call.prompt_logprobs.append(self._logprob(call.prompt[0], None, ()))

    def read(self, start: int, tokens: Items[int], drawn: Items[Drawn]) -> None:
        """Take in how likely prompt tokens were.

        Args:
            start: the position of the first, which is not the prompt's first.
        """
        read = self._call.prompt_logprobs
        for position, (token, each) in enumerate(zip(tokens, drawn, strict=True), start):
            if position == len(read):  # not what is computed anew
                read.append(self._logprob(token, each.logprob, each.top))

    def add(self, token: int, drawn: Drawn) -> bool:
        """Take in what was drawn. True if the sequence ends with it.

        Raises:
            InvalidInput: the constraint takes more to follow than is allowed.
        """
        self.sampler.drew(token)
        self._tokens.append(token)
        if drawn.logprob is not None:
            self._logprobs.append(self._logprob(token, drawn.logprob, drawn.top))
        if token in self._stop_tokens:
            return True
        self._pieces.append(self._text.push(token))
        constraint = self.sampler.constraint
        return self._text.stopped or (constraint is not None and constraint.complete)

    def delta(
        self,
        finish_reason: FinishReason | None = None,
        usage: Usage | None = None,
        timings: Timings | None = None,
    ) -> Delta:
        """Everything new, as one message."""
        if finish_reason is not None:
            self._pieces.append(self._text.finish())
        delta = Delta(
            index=self._index,
            text="".join(self._pieces),
            token_ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs) if self._wants_logprobs else None,
            prompt=None if self._prompt is None else tuple(self._prompt),
            finish_reason=finish_reason,
            usage=usage,
            timings=timings,
        )
        self._tokens.clear()
        self._pieces.clear()
        self._logprobs.clear()
        self._prompt = None
        return delta

    def _logprob(
        self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]
    ) -> TokenLogprob:
        shown = self._codec.token
        return TokenLogprob(
            token_id=token,
            token=shown(token),
            logprob=logprob,
            top=tuple(TopLogprob(token_id=i, token=shown(i), logprob=value) for i, value in top),
        )
