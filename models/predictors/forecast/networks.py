"""Two neural forecasters, trained on many series at once: an LSTM and a Transformer.

Both read the logarithms of the last ``context`` values, less the mean of the last season,
and say how far above the last season each coming value will be: its median, and how far
the interval reaches below and above. A fresh network therefore forecasts the seasonal
naive's values, and whatever it learns is better than that.

Shapes: b series, c context, h horizon, d width, 3 = lower, median, upper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.predictors.forecast.settings import NetworkSettings

LIMIT = 5.0
"""Logarithms are cut here: nothing in the data is 150 times its last season's mean."""


class Ensemble(nn.Module):
    """Networks of one kind from different seeds; the mean of what they say."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        build = _LSTM if settings.kind == "lstm" else _Transformer
        self.settings = settings
        self.members = nn.ModuleList(build(settings) for _ in range(settings.members))

    def forward(self, logs_bc: Tensor, known_bc: Tensor) -> Tensor:
        """(b, h, 3). ``logs_bc`` is anything where ``known_bc`` is 0; the last season is known."""
        return torch.stack([member(logs_bc, known_bc) for member in self.members]).mean(0)


class _Forecaster(nn.Module):
    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self, logs_bc: Tensor, known_bc: Tensor) -> Tensor:
        period, horizon = self.settings.period, self.settings.horizon
        level_b1 = logs_bc[:, -period:].mean(1, keepdim=True)
        values_bc = ((logs_bc - level_b1) * known_bc).clamp(-LIMIT, LIMIT)
        growth_bc = torch.zeros_like(values_bc)
        both_bc = known_bc[:, period:] * known_bc[:, :-period]
        growth_bc[:, period:] = (values_bc[:, period:] - values_bc[:, :-period]) * both_bc
        repeats = -(-horizon // period)
        base_bh = values_bc[:, -period:].repeat(1, repeats)[:, :horizon]
        features_bcf = torch.stack([values_bc, growth_bc, known_bc], dim=-1)
        raw_bh3 = self.look_ahead(features_bcf, base_bh)
        median_bh = base_bh + raw_bh3[..., 1]
        reach_bh2 = nn.functional.softplus(raw_bh3[..., ::2] - 2)
        lower_bh, upper_bh = median_bh - reach_bh2[..., 0], median_bh + reach_bh2[..., 1]
        return torch.stack([lower_bh, median_bh, upper_bh], dim=-1) + level_b1.unsqueeze(-1)

    def look_ahead(self, features_bcf: Tensor, base_bh: Tensor) -> Tensor:
        """(b, h, 3); all zero from a fresh network."""
        raise NotImplementedError


class _LSTM(_Forecaster):
    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__(settings)
        self.lstm = nn.LSTM(3, settings.width, batch_first=True)
        self.head = _silent(nn.Linear(settings.width + settings.horizon, 3 * settings.horizon))

    def look_ahead(self, features_bcf: Tensor, base_bh: Tensor) -> Tensor:
        hidden_bcd, _ = self.lstm(features_bcf)
        seen = torch.cat([hidden_bcd[:, -1], base_bh], dim=-1)
        return cast(Tensor, self.head(seen)).unflatten(-1, (-1, 3))


class _Transformer(_Forecaster):
    """An encoder over the context and one query for each coming step."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__(settings)
        width = settings.width
        steps = settings.context + settings.horizon
        self.embed = nn.Linear(3, width)
        self.query = nn.Linear(1, width)
        self.position = nn.Parameter(0.02 * torch.randn(steps, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, settings.layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = _silent(nn.Linear(width, 3))

    def look_ahead(self, features_bcf: Tensor, base_bh: Tensor) -> Tensor:
        tokens = torch.cat([self.embed(features_bcf), self.query(base_bh.unsqueeze(-1))], dim=1)
        ahead = torch.zeros_like(base_bh, dtype=torch.bool)
        unknown = torch.cat([features_bcf[..., 2] == 0, ahead], dim=1)
        hidden = self.encoder(tokens + self.position, src_key_padding_mask=unknown)
        return cast(Tensor, self.head(hidden[:, -base_bh.shape[1] :]))


def _silent(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def contexts(series: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """The last ``length`` values of each, padded on the left: (b, c) and which are known."""
    logs_bc = torch.zeros(len(series), length, dtype=torch.float64)
    known_bc = torch.zeros_like(logs_bc)
    for row, values in enumerate(series):
        tail = values[-length:]
        logs_bc[row, length - len(tail) :] = tail
        known_bc[row, length - len(tail) :] = 1
    return logs_bc, known_bc
