"""Packed linear layers compute the same and hold their weights once."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from deployments.engines.linears import (
    PACK_ROWS,
    PackedLinear,
    SharedLinear,
    as_linear,
    observed_groups,
    pack_if_equal,
    pack_linears,
)
from tests import tiny_models
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


def test_layers_whose_weights_lie_the_other_way_round(tmp_path: Path) -> None:
    folder = tiny_models.make("gpt2", tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    model = copy.deepcopy(plain)
    as_linear(model)
    assert not [module for module in model.modules() if isinstance(module, Conv1D)]
    names, before = ([name for name, _ in each.named_modules()] for each in (model, plain))
    assert names == before
    tokens = torch.arange(40)[None]
    assert torch.allclose(model(tokens).logits, plain(tokens).logits, rtol=0, atol=1e-12)


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
    assert len(pack_linears(model)) == 2
    gc.collect()
    assert [storage() for storage in storages] == [None] * 3
    assert [type(m) for m in (model[0], model[1][0])] == [PackedLinear, PackedLinear]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_left_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(linear(8, 8, bias=True).to(dtype))
    assert pack_linears(model) == []
    assert type(model[0]) is nn.Linear


def test_subclasses_are_left_alone() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert pack_linears(nn.Sequential(Scaled(4, 4))) == []


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model(kind: str, tied: bool) -> None:
    config = copy.deepcopy(CONFIGS[kind])
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    tokens = torch.arange(20)[None]
    expected = model(tokens, use_cache=False).logits
    assert pack_linears(model)
    assert type(model.lm_head) is PackedLinear
    assert torch.allclose(model(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-5)


class Block(nn.Module):
    """Two layers over one tensor, one of them with a bias, and one over another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(8, 4, bias=True), linear(8, 6, bias=False)
        self.c = linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.b(x), self.c(self.a(x))], dim=-1)


def shared_block() -> tuple[Block, Block]:
    plain = Block()
    block = copy.deepcopy(plain)
    with observed_groups(block) as groups:
        block(torch.randn(2, 8))
    assert groups == [[block.b, block.a]]
    assert len(pack_linears(block, groups)) == 3
    assert [type(m) for m in (block.a, block.b, block.c)] == [
        SharedLinear,
        SharedLinear,
        PackedLinear,
    ]
    return plain, block


def test_layers_over_the_same_tensor_are_computed_as_one() -> None:
    plain, block = shared_block()
    calls = []
    block.a._group.packed.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(5, 8)
    assert torch.allclose(block(x), plain(x), rtol=0, atol=1e-6)
    assert len(calls) == 1


def test_sharing_is_right_in_any_order_of_calls() -> None:
    plain, block = shared_block()
    x, y = torch.randn(5, 8), torch.randn(3, 8)
    for name, given in [("a", x), ("a", x), ("b", y), ("a", x), ("b", x), ("b", x), ("a", y)]:
        got = getattr(block, name)(given)
        assert torch.allclose(got, getattr(plain, name)(given), rtol=0, atol=1e-6)


def test_nothing_is_kept_after_the_last_layer() -> None:
    _, block = shared_block()
    x = torch.randn(5, 8)
    kept = weakref.ref(x)
    block(x)
    del x
    gc.collect()
    assert kept() is None


def test_layers_called_twice_in_a_pass_are_not_shared() -> None:
    block = Block()
    with observed_groups(block) as groups:
        for x in (torch.randn(2, 8), torch.randn(2, 8)):
            block(x)
    assert groups == []
    assert not block.a._forward_pre_hooks


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_shares_query_key_value_and_gate_up(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    tokens = torch.arange(20)[None]
    with observed_groups(model) as groups:
        expected = model(tokens, use_cache=False).logits
    assert [len(group) for group in groups] == [3, 2] * model.config.num_hidden_layers
    pack_linears(model, groups)
    assert torch.allclose(model(tokens, use_cache=False).logits, expected, rtol=0, atol=1e-5)


def test_a_model_that_reads_its_weights_keeps_its_plain_layers() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear(8, 4, bias=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.a.weight.T + self.a(x)

    model, x = Reader(), torch.randn(3, 8)
    plain, expected = model.a, model(x)
    assert pack_if_equal(model, [], lambda: model(x)) == 0
    assert model.a is plain
    assert torch.equal(model(x), expected)


def test_packing_that_changes_the_answer_is_undone() -> None:
    model = nn.Sequential(linear(8, 4, bias=True))
    answers = iter([torch.ones(1), torch.zeros(1)])
    assert pack_if_equal(model, [], lambda: next(answers)) == 0
    assert type(model[0]) is nn.Linear


def test_packing_that_changes_nothing_stays() -> None:
    model, x = nn.Sequential(linear(8, 4, bias=True)), torch.randn(3, 8)
    assert pack_if_equal(model, [], lambda: model(x)) == 1
    assert type(model[0]) is PackedLinear


MANY_SHAPES = """
import psutil
import torch
from torch import nn
from deployments.engines.linears import PackedLinear, keep_few_compiled

def resident_mb():
    return psutil.Process().memory_info().rss / 1e6

keep_few_compiled()
layers = [PackedLinear(nn.Linear(width, 256)) for width in (128, 192, 256, 384)]
with torch.inference_mode():
    for rows in range(1, 161):
        if rows == 41:
            before = resident_mb()
        for layer in layers:
            layer(torch.zeros(rows, layer.in_features))
print(resident_mb() - before)
"""


def test_products_of_ever_new_shapes_do_not_fill_the_memory() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", MANY_SHAPES], capture_output=True, text=True, check=True
    )
    assert float(ran.stdout) < 60  # 480 more shapes: 200 MB where they are all kept
