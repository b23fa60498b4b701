"""What a forecasting artifact holds beside weights: ``forecast.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FILE = "forecast.json"


class NetworkSettings(BaseModel):
    """Shape of one neural forecaster; its weights are ``{kind}.safetensors``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lstm", "transformer"]
    period: int = Field(ge=1, le=100)
    context: int = Field(ge=2, le=1000)
    horizon: int = Field(ge=1, le=100)
    width: int = Field(ge=4, le=1024)
    layers: int = Field(ge=1, le=12)
    members: int = Field(ge=1, le=20)

    @property
    def shortest(self) -> int:
        """Values that it must see: two seasons."""
        return 2 * self.period


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    default: str
    """The method of a request that names none."""
    methods: tuple[str, ...]
    """Those that a request may name."""
    coverage: float = Field(gt=0, lt=1)
    """Share of values that fall between ``lower`` and ``upper``, as far as a method can tell."""
    networks: tuple[NetworkSettings, ...] = ()
