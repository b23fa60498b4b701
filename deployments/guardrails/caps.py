"""What a plan lets one answer have (spec C6): new tokens, and temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.contracts import Sampling
from models.errors import InvalidInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    plan: str | None = None
    max_new_tokens: int | None = None
    max_temperature: float | None = None

    def hold(self, asked: Sampling, default: Sampling) -> Sampling:
        """``asked``, within the caps.

        What a client asks for beyond them is refused, never cut in silence. What it left open
        is the model's ``default``, which is nobody's wish, and is held to them.

        Raises:
            InvalidInput: naming the field, the cap and the plan.
        """
        held = asked
        tokens, cap = asked.max_tokens, self.max_new_tokens
        if cap is not None:
            if tokens is None:
                held = replace(held, token_cap=cap)
            elif tokens > cap:
                if tokens != default.max_tokens:
                    raise self._beyond("max_new_tokens", "max_tokens", tokens, cap)
                held = replace(held, max_tokens=cap)
        heat, most = asked.temperature, self.max_temperature
        if most is not None and heat > most:
            if heat != default.temperature:
                raise self._beyond("max_temperature", "temperature", heat, most)
            held = replace(held, temperature=most)
        return held

    def _beyond(self, cap: str, field: str, given: float, allowed: float) -> InvalidInput:
        return InvalidInput(
            f"{field} is {given}; the plan {self.plan!r} allows {allowed} at most.",
            param=field,
            details={"guardrail": cap, "category": self.plan, "allowed": allowed},
        )
