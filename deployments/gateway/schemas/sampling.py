"""How a client says what is drawn: the fields that all generating routes share."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import Field

from deployments.gateway.schemas.base import Strict, TokenId, by_shape, shape
from models.contracts import Sampling

StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=512)]
Stop: TypeAlias = Annotated[
    Annotated[StopText, shape("text")]
    | Annotated[list[StopText], shape("list"), Field(max_length=4)],
    by_shape("a string or a list of at most 4 strings"),
]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]


class SamplingFields(Strict):
    """Null means the model's default, which its entry in the configuration may set."""

    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31, description="0: no limit.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[TokenId, Bias] | None = Field(default=None, max_length=1024)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=64)
    ignore_eos: bool | None = None

    PASSED_ON: ClassVar[frozenset[str]] = frozenset(
        {
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "seed",
            "ignore_eos",
        }
    )
    """Fields that mean the same, under the same name, in ``Sampling``."""

    def sampling(self, defaults: Sampling, **overrides: object) -> Sampling:
        """The contract's form.

        Args:
            defaults: the model's, for what the client leaves open.
            overrides: fields that the protocol words differently.
        """
        given: dict[str, Any] = {
            name: value
            for name in self.model_fields_set & self.PASSED_ON
            if (value := getattr(self, name)) is not None
        }
        if self.stop:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
        return replace(defaults, **{**given, **overrides})
