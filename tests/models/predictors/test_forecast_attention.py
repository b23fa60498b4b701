"""Attention rollout by hand, on a transformer of the library's, and on the forecasting one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from models.errors import ConfigError, InvalidInput
from models.predictors import forecast, forecast_attention
from models.predictors.forecast.networks import Ensemble
from models.predictors.forecast.settings import FILE, NetworkSettings, Settings
from models.predictors.forecast_attention import observed_attention, rollout

SERIES = [100.0 + month + 20 * (month % 12 == 3) for month in range(60)]
SHAPE = NetworkSettings(
    kind="transformer", period=12, context=36, horizon=18, width=8, layers=2, members=2
)


def artifact(folder: Path, *shapes: NetworkSettings) -> Path:
    """Networks that have learned nothing but are not silent."""
    folder.mkdir()
    for seed, shape in enumerate(shapes):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            ensemble = Ensemble(shape)
            for member in ensemble.members:
                nn.init.normal_(member.head.weight, std=0.02)  # type: ignore[arg-type]
        save_file(ensemble.state_dict(), folder / f"{shape.kind}.safetensors")
    settings = Settings(
        default="naive",
        methods=("naive", *(shape.kind for shape in shapes)),
        coverage=0.9,
        networks=shapes,
    )
    (folder / FILE).write_text(settings.model_dump_json())
    return folder


@pytest.fixture
def forecaster(tmp_path: Path) -> Path:
    return artifact(tmp_path / "forecaster", SHAPE.model_copy(update={"kind": "lstm"}), SHAPE)


@pytest.fixture
def explained(forecaster: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "explained"
    folder.mkdir()
    forecast_attention.save(folder, forecaster)
    return folder


def test_two_layers_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    second = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = rollout([first[None, None], torch.stack([second, second])[None]])
    # half attention, half what was already there: (first + 1) / 2, then (second + 1) / 2
    assert found.tolist() == [[[1.0, 0.0], [0.625, 0.375]]]


def test_rows_of_a_causal_language_model_add_up_and_look_back_only() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        told = model(torch.arange(7)[None], output_attentions=True)
    found = rollout(told.attentions)
    assert found.shape == (1, 7, 7)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 7))
    assert found.triu(1).abs().max() == 0


def test_what_is_observed_is_what_the_layers_computed_with() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    tokens = torch.rand(3, 5, 8, dtype=torch.float64)
    unknown = torch.zeros(3, 5, dtype=torch.bool)
    unknown[1, :2] = True
    with torch.no_grad():
        plain = encoder(tokens, src_key_padding_mask=unknown)
        with observed_attention(encoder) as seen:
            again = encoder(tokens, src_key_padding_mask=unknown)
        torch.testing.assert_close(again, plain)
        assert [weights.shape for weights in seen] == [(3, 2, 5, 5)] * 2
        assert seen[0][1, :, :, :2].abs().max() == 0
        # The first layer, put together again from its weights.
        one: Any = encoder.layers[0]
        value_weight, value_bias = (
            one.self_attn.in_proj_weight[16:],
            one.self_attn.in_proj_bias[16:],
        )
        values = one.norm1(tokens) @ value_weight.T + value_bias
        heads = seen[0] @ values.unflatten(-1, (2, 4)).transpose(1, 2)
        hidden = tokens + one.self_attn.out_proj(heads.transpose(1, 2).flatten(2))
        hidden = hidden + one.linear2(torch.relu(one.linear1(one.norm2(hidden))))
        torch.testing.assert_close(hidden, one(tokens, src_key_padding_mask=unknown))
        encoder(tokens)
    assert len(seen) == 2, "outside of the block nothing is observed"


def test_an_answer_is_the_forecasters_with_shares_of_what_it_saw(
    explained: Path, forecaster: Path
) -> None:
    inputs: Any = [
        {"series": SERIES, "period": 12, "horizon": 14},
        {"series": SERIES[:25], "period": 12, "horizon": 3},
    ]
    plain: Any = forecast.load(forecaster).predict_batch(
        [{**one, "method": "transformer"} for one in inputs]
    )
    answers: Any = forecast_attention.load(explained).predict_batch(inputs)
    for answer, expected, (steps, months) in zip(answers, plain, [(14, 36), (3, 25)], strict=True):
        shares = np.array(answer.pop("attention"))
        assert answer == expected
        assert shares.shape == (steps, months)
        assert shares.sum(1) == pytest.approx(np.ones(steps))
        assert (shares > 0).all()


def test_what_else_is_in_the_batch_does_not_matter(explained: Path) -> None:
    predictor = forecast_attention.load(explained)
    inputs: Any = [{"series": SERIES[i:], "period": 12, "horizon": 5} for i in (0, 7, 30)]
    alone: Any = [predictor.predict_batch([one])[0] for one in inputs]
    together: Any = predictor.predict_batch(inputs[::-1])[::-1]
    for one, other in zip(alone, together, strict=True):
        assert np.array(one["attention"]) == pytest.approx(np.array(other["attention"]), rel=1e-9)
    assert predictor.predict_batch([]) == []


def test_the_explaining_artifact_holds_the_transformer_as_it_was(
    explained: Path, forecaster: Path
) -> None:
    name = forecast_attention.WEIGHTS
    assert {path.name for path in explained.iterdir()} == {FILE, name}
    assert (explained / name).read_bytes() == (forecaster / name).read_bytes()


def test_other_methods_and_bad_series_are_refused(explained: Path) -> None:
    predictor = forecast_attention.load(explained)
    good = {"series": SERIES, "period": 12}
    for bad in ({**good, "method": "naive"}, {"series": SERIES[:20], "period": 12}):
        with pytest.raises(InvalidInput) as caught:
            predictor.predict_batch([good, bad])  # type: ignore[list-item]
        assert caught.value.details["index"] == 1


def test_a_forecaster_without_attention_is_refused(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "lstm", SHAPE.model_copy(update={"kind": "lstm"}))
    with pytest.raises(ConfigError, match=r"only a transformer has attention.*naive, lstm"):
        forecast_attention.save(tmp_path, folder)
