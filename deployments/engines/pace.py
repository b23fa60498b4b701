"""How much of a prompt a step may read in while streams run, so that they do not stall.

A step with prompt tokens takes longer than one that only decodes, and every stream in it waits.
What both take is measured as the engine goes: the *beat*, of steps that only decode, and what a
prompt token adds to it. A step may then hold as many as stretch the beat by ``stretch``.

Chunked prefill is Sarathi-Serve's (Agrawal et al., OSDI 2024), which has a fixed budget of tokens;
on processors from two cores to a GPU, and from 1 to 64 streams, no fixed one fits.
"""

from __future__ import annotations

FEWEST = 16
"""Prompt tokens of a step, whatever they cost: prompts must come to an end."""
MEMORY = 0.1
"""Weight of the newest measurement."""


class Pace:
    """Measured, never configured.

    Args:
        stretch: how many times the beat a step may take; ``None``: any.
    """

    def __init__(self, stretch: float | None) -> None:
        self._stretch = stretch
        self._beat: float | None = None
        self._cost: float | None = None
        """Seconds that a prompt token adds."""

    def measured(self, *, decode_tokens: int, prefill_tokens: int, seconds: float) -> None:
        """A step was run."""
        if not decode_tokens:
            if self._cost is None and prefill_tokens:  # too high, for want of better
                self._cost = seconds / prefill_tokens
        elif not prefill_tokens:
            self._beat = _mean(self._beat, seconds)
        elif self._beat is not None:
            self._cost = _mean(self._cost, max(seconds - self._beat, 0.0) / prefill_tokens)

    def prompt_tokens(self, most: int) -> int:
        """How many a step may take, beside streams."""
        if self._stretch is None or self._beat is None or not self._cost:
            return most
        affordable = int((self._stretch - 1) * self._beat / self._cost)
        return min(most, max(FEWEST, affordable))


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + MEMORY * (new - old)
