"""Models as Llama: RMSNorm, attention with rotary positions, RMSNorm, gated SiLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import silu

from deployments.engines.fused import OtherStructure
from deployments.engines.fused.layer import Layer, Linear, Norm, cached, check_leaves, product
from deployments.engines.linears import SharedLinear

LEAVES = {
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.act_fn",
    "mlp.down_proj",
}


class Llama:
    """See ``Structure``."""

    def __init__(self, model: Any) -> None:
        decoder = model.get_decoder()
        self.modules: list[nn.Module] = list(decoder.layers)
        self.norm: nn.Module = decoder.norm
        self._embed: nn.Module = model.get_input_embeddings()
        self._rotary: nn.Module = decoder.rotary_emb

    def layer(
        self, kind: type[Linear], module: Any, keys: torch.Tensor, values: torch.Tensor
    ) -> Layer[Linear]:
        check_leaves(module, LEAVES)
        attention, mlp = module.self_attn, module.mlp
        some = torch.linspace(-8, 8, 65)
        if not torch.allclose(mlp.act_fn(some), silu(some)):
            raise OtherStructure("its gates are not SiLU's")
        own = [attention.q_proj, attention.k_proj, attention.v_proj]
        qkv = product(kind, SharedLinear.together(own))
        gate_up = product(kind, SharedLinear.together([mlp.gate_proj, mlp.up_proj]))
        out, down = product(kind, attention.o_proj), product(kind, mlp.down_proj)
        before_attention, before_mlp = module.input_layernorm, module.post_attention_layernorm
        places = cached(keys, values)
        heads, inner = out.in_features, down.in_features
        keys_end = heads + places[0].shape[1] * places[0].shape[2]
        return Layer(
            Norm.of(before_attention, before_attention.variance_epsilon, centred=False),
            qkv,
            *places,
            scaling=attention.scaling,
            window=_window(attention),
            out=out,
            mlp_norm=Norm.of(before_mlp, before_mlp.variance_epsilon, centred=False),
            up=gate_up,
            gated=True,
            down=down,
            parts={
                "self_attn.q_proj": (qkv, slice(0, heads)),
                "self_attn.k_proj": (qkv, slice(heads, keys_end)),
                "self_attn.v_proj": (qkv, slice(keys_end, None)),
                "self_attn.o_proj": (out, slice(None)),
                "mlp.gate_proj": (gate_up, slice(0, inner)),
                "mlp.up_proj": (gate_up, slice(inner, None)),
                "mlp.down_proj": (down, slice(None)),
            },
        )

    def embedded(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self._embed(tokens)
        return x

    def turn(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._rotary(x[None], positions[None])
        return cos[0], sin[0]

    def own_turn(self, named: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        if "position_embeddings" not in named:
            raise OtherStructure("its layers are told of positions in another way")
        turn: tuple[torch.Tensor, torch.Tensor] = named["position_embeddings"]
        return turn


def _window(attention: Any) -> int | None:
    """Its own, if it has a word on it; else its model's."""
    place = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(place, "sliding_window", None)
    return window
