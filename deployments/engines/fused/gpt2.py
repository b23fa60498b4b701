"""Models as GPT-2: LayerNorm, attention, LayerNorm, GELU; positions are embedded like tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import gelu

from deployments.engines.fused import OtherStructure
from deployments.engines.fused.layer import Layer, Linear, Norm, cached, check_leaves, product

LEAVES = {
    "ln_1",
    "attn.c_attn",
    "attn.c_proj",
    "attn.attn_dropout",
    "attn.resid_dropout",
    "ln_2",
    "mlp.c_fc",
    "mlp.c_proj",
    "mlp.act",
    "mlp.dropout",
}


class Gpt2:
    """See ``Structure``."""

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder()
        self.modules: list[nn.Module] = list(decoder.h)
        self.norm: nn.Module = decoder.ln_f
        self._embed: nn.Module = decoder.wte
        self._places: nn.Module = decoder.wpe
        self._dim: int = decoder.h[0].attn.head_dim

    def layer(
        self, kind: type[Linear], module: Any, keys: torch.Tensor, values: torch.Tensor
    ) -> Layer[Linear]:
        check_leaves(module, LEAVES)
        attention, mlp = module.attn, module.mlp
        some = torch.linspace(-8, 8, 65)
        if not torch.allclose(mlp.act(some), gelu(some, approximate="tanh"), atol=1e-6):
            raise OtherStructure("its activation is not GELU by tanh")
        qkv, out = product(kind, attention.c_attn), product(kind, attention.c_proj)
        up, down = product(kind, mlp.c_fc), product(kind, mlp.c_proj)
        return Layer(
            Norm.of(module.ln_1, module.ln_1.eps, centred=True),
            qkv,
            *cached(keys, values),
            scaling=attention.scaling,
            window=None,
            out=out,
            mlp_norm=Norm.of(module.ln_2, module.ln_2.eps, centred=True),
            up=up,
            gated=False,
            down=down,
            parts={
                "attn.c_attn": (qkv, slice(None)),
                "attn.c_proj": (out, slice(None)),
                "mlp.c_fc": (up, slice(None)),
                "mlp.c_proj": (down, slice(None)),
            },
        )

    def embedded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self._embed(tokens) + self._places(positions)
        return x

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """By nothing."""
        none = x.new_zeros(len(x), self._dim)
        return none + 1, none

    def own_turn(self, named: Mapping[str, Any]) -> None:
        if "position_embeddings" in named:
            raise OtherStructure("its layers are told to turn by positions")
