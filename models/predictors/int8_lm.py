"""A causal language model in a quarter of the bytes: how probable a text is to it.

``{"text": "The capital of France is Paris."}`` becomes ``{"tokens": 7, "log_probability": -14.2,
"perplexity": 10.7}``: of all tokens but the first, given those before them.

::

    config.json, tokenizer.json …   as transformers reads them
    model.safetensors               matrices in int8, each with NAME.scale; the rest in float32

Whole numbers are for storage and transport. They become float32 once, at load: what is computed is
what ``engine.dtype: int8`` computes, but for its rounding of activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from models.contracts import Json
from models.errors import ConfigError
from models.int8 import quantise
from models.predictors.requests import Input, parse, refuse

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
SCALE = ".scale"
LONGEST = 100_000
"""Characters of a text."""


class Request(Input):
    text: Annotated[str, Field(strict=True, min_length=1, max_length=LONGEST)]


def save(folder: Path, network: Any, tokenizer: Any) -> None:
    """Write what ``read`` reads, of a transformers model in float32."""
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    for name, weight in network.named_parameters():  # tied ones once
        value = weight.detach().cpu().float()
        if value.dim() == 2:
            kept[name], kept[name + SCALE] = quantise(value)
        else:
            kept[name] = value.contiguous()
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    network.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read(folder: Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer.

    Raises:
        ConfigError: the files do not fit each other.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        kept = load_file(folder / WEIGHTS)
        state = {
            name: value * kept[name + SCALE][:, None] if value.dtype == torch.int8 else value
            for name, value in kept.items()
            if not name.endswith(SCALE)
        }
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.random.fork_rng(devices=[]):  # its first weights are drawn
            network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        wrong = state.keys() ^ {name for name, _ in network.named_parameters()}
        if not wrong:
            network.load_state_dict(state, strict=False)  # tied weights have a second name
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{folder}: holds no model that can be used ({said})") from None
    if wrong:
        names = ", ".join(sorted(wrong)[:3])
        raise ConfigError(f"{folder}: {WEIGHTS} is not of config.json: {names}")
    return network.eval(), tokenizer


def load(folder: Path) -> TextScorer:
    return TextScorer(*read(folder))


class TextScorer:
    def __init__(self, network: Any, tokenizer: Any) -> None:
        self._network, self._tokenizer = network, tokenizer
        self._context: int = network.config.max_position_embeddings

    def predict_batch(self, inputs: Sequence[Json]) -> list[Json]:
        """See :class:`models.contracts.Predictor`."""
        texts = [each.text for each in parse(Request, inputs)]
        tokens = [self._tokens(text, index) for index, text in enumerate(texts)]
        return [self._scored(one) for one in tokens]  # one at a time, without padding

    def _tokens(self, text: str, index: int) -> list[int]:
        found: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        if not 2 <= len(found) <= self._context:
            problem = f"text has {len(found)} tokens, expected 2 to {self._context}."
            raise refuse(index, "text", problem)
        return found

    def _scored(self, tokens: list[int]) -> Json:
        import torch
        from torch.nn.functional import cross_entropy

        ids = torch.tensor([tokens])
        with torch.inference_mode():
            logits = self._network(input_ids=ids, use_cache=False).logits[0, :-1].float()
        surprise = cross_entropy(logits, ids[0, 1:])
        return {
            "tokens": len(tokens),
            "log_probability": -float(surprise) * (len(tokens) - 1),
            "perplexity": float(surprise.exp()),
        }
