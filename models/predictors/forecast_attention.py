"""Which months the forecasting Transformer looked at: {forecast, lower, upper, method, attention}.

Inputs are those of :mod:`models.predictors.forecast`. ``attention`` has a row for each step of the
forecast and in it a share for each value of the series that the network sees, the last ones; a row
adds up to 1. It is attention rollout (Abnar, Zuidema 2020), the mean over the networks of the
ensemble.

::

    forecast.json             of a forecasting artifact, the Transformer alone
    transformer.safetensors   its weights
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from models.contracts import Json
from models.errors import ConfigError
from models.predictors import forecast
from models.predictors.forecast.settings import FILE, NetworkSettings, Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from models.predictors.forecast.networks import Ensemble

KIND = "transformer"
WEIGHTS = f"{KIND}.safetensors"


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """How much of each input position reaches each output position, through all layers.

    Heads are averaged, the residual connection counts as much as attention, layers are multiplied
    (Abnar, Zuidema 2020, Quantifying Attention Flow in Transformers).

    Args:
        attentions: per layer, shape (batch, heads, to, from).

    Returns:
        Shape (batch, to, from); rows add up to 1.
    """
    import torch

    eye = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype)
    flow = eye.expand(len(attentions[0]), -1, -1)
    for attention in attentions:
        flow = ((attention.mean(1) + eye) / 2) @ flow
    return flow


@contextmanager
def observed_attention(encoder: nn.TransformerEncoder) -> Iterator[list[Tensor]]:
    """Yields what a forward pass in the block fills: by layer, (batch, heads, to, from)."""
    seen: list[Tensor] = []

    def note(layer: Any, given: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        # The layer itself asks for no weights: they are computed beside it, of the same input.
        normed = layer.norm1(given[0])
        _, weights = layer.self_attn(
            normed,
            normed,
            normed,
            key_padding_mask=named["src_key_padding_mask"],
            need_weights=True,
            average_attn_weights=False,
        )
        seen.append(weights)

    hooks = [
        cast("nn.Module", layer).register_forward_pre_hook(note, with_kwargs=True)
        for layer in encoder.layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def attention(ensemble: Ensemble, logs_bc: Tensor, known_bc: Tensor) -> Tensor:
    """(b, h, c): the share of each value in what reaches each step from all of them."""
    import torch

    flows = []
    for member in ensemble.members:
        with torch.no_grad(), observed_attention(cast(Any, member).encoder) as seen:
            member(logs_bc, known_bc)
        flow_bhc = (
            rollout(seen)[:, -ensemble.settings.horizon :, : logs_bc.shape[1]] * known_bc[:, None]
        )
        flows.append(flow_bhc / flow_bhc.sum(-1, keepdim=True))
    return torch.stack(flows).mean(0)


def transformer_of(folder: Path) -> tuple[Settings, forecast.Network]:
    """The Transformer of a forecasting artifact, and settings for it alone.

    Raises:
        ConfigError: it has none.
    """
    settings = Settings.model_validate_json((folder / FILE).read_bytes())
    shape: NetworkSettings | None = next(
        (one for one in settings.networks if one.kind == KIND), None
    )
    if shape is None:
        raise ConfigError(
            f"{folder}: only a {KIND} has attention, and this forecaster knows"
            f" {', '.join(settings.methods)}"
        )
    alone = Settings(default=KIND, methods=(KIND,), coverage=settings.coverage, networks=(shape,))
    return alone, forecast.Network(shape, folder / WEIGHTS)


def save(folder: Path, forecaster: Path) -> None:
    """Write what ``load`` reads, with a copy of the weights. Raises ConfigError as above."""
    settings, _ = transformer_of(forecaster)
    (folder / FILE).write_text(settings.model_dump_json(indent=2) + "\n")
    shutil.copyfile(forecaster / WEIGHTS, folder / WEIGHTS)


def load(folder: Path) -> ExplainedForecaster:
    """Raises ConfigError: the artifact has no Transformer."""
    return ExplainedForecaster(*transformer_of(folder))


class ExplainedForecaster:
    def __init__(self, settings: Settings, network: forecast.Network) -> None:
        self._forecaster = forecast.Forecaster(settings, {KIND: network})
        self._network = network

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        """See :class:`models.contracts.Predictor`."""
        answers = cast("list[dict[str, Any]]", self._forecaster.predict_batch(inputs))
        if not answers:
            return []
        series = [cast("dict[str, Any]", one)["series"] for one in inputs]
        context = self._network.settings.context
        shares_bhc = attention(self._network.ensemble, *self._network.seen(series))
        return [
            {
                **answer,
                "attention": shares_hc[
                    : len(answer["forecast"]), -min(len(values), context) :
                ].tolist(),
            }
            for answer, values, shares_hc in zip(answers, series, shares_bhc, strict=True)
        ]
