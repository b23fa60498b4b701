"""Packed linear layers compute the same and hold their weights once."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deployments.engines.linears import PACK_ROWS, PackedLinear, pack_linears
from tests.tiny_models import CONFIGS

pytestmark = pytest.mark.skipif(not torch._C._has_mkldnn, reason="torch without oneDNN")


@pytest.fixture(autouse=True)
def _inference() -> object:
    with torch.inference_mode():
        yield


def linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    torch.manual_seed(inputs * 1000 + outputs)
    return nn.Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 96), (33, 7), (1, 5), (5, 1), (576, 192)])
def test_equals_the_plain_layer_for_any_number_of_rows(
    inputs: int, outputs: int, bias: bool
) -> None:
    plain = linear(inputs, outputs, bias=bias)
    packed = PackedLinear(plain)
    x = torch.randn(300, inputs)
    expected = plain(x)
    for rows in (*range(1, 2 * PACK_ROWS + 2), 100, 127, 128, 255, 256, 299, 300):
        assert torch.allclose(packed(x[:rows]), expected[:rows], rtol=0, atol=1e-5)


def test_shapes_and_layouts_of_the_input() -> None:
    plain = linear(24, 40, bias=True)
    packed = PackedLinear(plain)
    x = torch.randn(2, 7, 24)
    strided = torch.randn(24, 14).T
    for given in (x, x[:1], x[1, 2], strided, strided[::2], x.transpose(0, 1)):
        got = packed(given)
        assert got.shape == (*given.shape[:-1], 40)
        assert torch.allclose(got, plain(given), rtol=0, atol=1e-5)


def test_the_plain_parameters_are_freed() -> None:
    model = nn.Sequential(linear(64, 64, bias=True), nn.Sequential(linear(64, 32, bias=False)))
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    gc.collect()
    assert all(storage() is not None for storage in storages)
    assert pack_linears(model) == 2
    gc.collect()
    assert [storage() for storage in storages] == [None] * 3
    assert [type(m) for m in (model[0], model[1][0])] == [PackedLinear, PackedLinear]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(linear(8, 8, bias=True).to(dtype))
    assert pack_linears(model) == 0
    assert type(model[0]) is nn.Linear


def test_subclasses_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert pack_linears(nn.Sequential(Scaled(4, 4))) == 0


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(kind: str, tied: bool) -> None:
    config = copy.deepcopy(CONFIGS[kind])
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    tokens = torch.arange(20)[None]
    expected = model(tokens, use_cache=False).logits
    assert pack_linears(model) >= 1
    assert type(model.lm_head) is PackedLinear
    assert torch.allclose(model(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-5)
