"""What is minimised: a row of documents → its summed loss, for training and evaluation.

Losses are sums, never means: a mean over a micro-batch or a worker's share would weigh
tokens by their neighbours. Whoever calls divides by the weight of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid

from models.errors import ConfigError
from train.recipes.llm import frozen
from train.recipes.llm.attention import PackedAttention
from train.recipes.llm.config import LlmConfig
from train.recipes.llm.encoding import IGNORE, Example, Unit
from train.recipes.llm.frozen import Frozen
from train.recipes.llm.loss import token_losses
from train.recipes.llm.model import Model

TOLERANCE = 1e-3
HALF_PRECISION_TOLERANCE = 0.1
"""Largest accepted difference of a token's loss from the model's own."""


@dataclass(frozen=True, slots=True)
class Row:
    """Documents side by side. ``tokens`` and ``positions`` are ``[1, tokens]``."""

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    """Of each document."""
    places: torch.Tensor
    """Where there is a target: ``[targets]``."""
    targets: torch.Tensor
    documents: torch.Tensor
    """Which document each target is of: ``[targets]``."""

    @staticmethod
    def of(units: Sequence[Unit], device: torch.device) -> Row:
        examples: list[Example] = [example for unit in units for example in unit]
        lengths = [len(example) for example in examples]
        targets = np.concatenate([example.targets for example in examples])
        (places,) = np.nonzero(targets != IGNORE)
        documents = np.repeat(np.arange(len(examples)), lengths)[places]

        def tensor(values: Any) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)

        return Row(
            tokens=tensor(np.concatenate([example.tokens for example in examples]))[None],
            positions=tensor(np.concatenate([np.arange(length) for length in lengths]))[None],
            lengths=lengths,
            places=tensor(places),
            targets=tensor(targets[places]),
            documents=tensor(documents),
        )


class Objective(nn.Module):
    """Sums over a row, as a dictionary of scalars with ``loss`` among them."""

    unit = "tokens"

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = model.network  # so that wrappers find the parameters
        self._model = model
        self.attention = PackedAttention()
        self._fused = True
        self._head: Frozen | None = None

    def weigh(self, units: Sequence[Unit]) -> int:
        """What the sum over these units is divided by."""
        raise NotImplementedError

    def forward(self, row: Row) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def token_losses(self, row: Row) -> torch.Tensor:
        """Of each target of the row, float32."""
        self.attention.begin(row.lengths)
        model = self._model.causal_lm
        if not self._fused:
            logits = model(
                input_ids=row.tokens,
                position_ids=row.positions,
                use_cache=False,
                logits_to_keep=row.places,
            ).logits[0]
            return cross_entropy(logits.float(), row.targets, reduction="none")
        hidden = model.base_model(
            input_ids=row.tokens, position_ids=row.positions, use_cache=False
        ).last_hidden_state[0]
        return token_losses(
            hidden[row.places], model.get_output_embeddings(), row.targets, self._head
        )

    def attach(self, device: torch.device, *, freeze: bool = False) -> None:
        """Exchange the model's attention for the packed one, and see whether it fits.

        Args:
            freeze: also exchange layers that are not trained for packed ones.

        Raises:
            ConfigError: the model answers otherwise when documents share a row.
        """
        model = self._model.causal_lm
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.get_text_config().vocab_size
        documents = [
            torch.randint(0, vocabulary, (length,), generator=generator).numpy().astype(np.int32)
            for length in (7, 12)
        ]
        examples = [Example(tokens, np.append(tokens[1:], IGNORE)) for tokens in documents]
        was_training = self.training
        self.eval()
        with torch.no_grad(), self._model.autocast(device):
            own = torch.cat([_own_losses(model, example, device) for example in examples])
            model.set_attn_implementation(self.attention.name)
            row = Row.of([(example,) for example in examples], device)
            head = model.get_output_embeddings()
            self._fused = type(head) is nn.Linear and head.bias is None
            if freeze:
                frozen.freeze(model)
                if self._fused and Frozen.fits(head):
                    self._head = Frozen(head.weight)
            difference = float((self.token_losses(row) - own).abs().max())
            tolerance = (
                TOLERANCE if self._model.dtype == torch.float32 else HALF_PRECISION_TOLERANCE
            )
            if self._fused and not difference <= tolerance:  # it does more after the head
                self._fused = False
                difference = float((self.token_losses(row) - own).abs().max())
        if not difference <= tolerance:
            raise ConfigError(
                f"{type(model).__name__} cannot be trained on packed rows: its losses differ by"
                f" {difference:.2g} from those it has alone; its attention is not a plain causal"
                " one through transformers' AttentionInterface"
            )
        self.train(was_training)

    def close(self) -> None:
        self.attention.close()


class Supervised(Objective):
    """Cross-entropy of each target."""

    def weigh(self, units: Sequence[Unit]) -> int:
        return sum(example.trained for unit in units for example in unit)

    def forward(self, row: Row) -> dict[str, torch.Tensor]:
        return {"loss": self.token_losses(row).sum()}


class Dpo(Objective):
    """Direct preference optimisation (Rafailov et al. 2023): pairs, chosen before rejected.

    The base without its adapter is the reference.
    """

    unit = "pairs"

    def __init__(self, model: Model, beta: float) -> None:
        super().__init__(model)
        self._beta = beta

    def weigh(self, units: Sequence[Unit]) -> int:
        return len(units)

    def forward(self, row: Row) -> dict[str, torch.Tensor]:
        training = self.training
        with torch.no_grad(), self._model.without_adapter():
            self.eval()
            reference = self._log_likelihoods(row)
            self.train(training)
        rewards = self._beta * (self._log_likelihoods(row) - reference)
        margin = rewards[0::2] - rewards[1::2]
        return {
            "loss": -logsigmoid(margin).sum(),
            "accuracy": (margin > 0).float().sum().detach(),
            "margin": margin.sum().detach(),
        }

    def _log_likelihoods(self, row: Row) -> torch.Tensor:
        """Of each document: ``[documents]``."""
        losses = self.token_losses(row)
        return losses.new_zeros(len(row.lengths)).index_add(0, row.documents, -losses)


def make(config: LlmConfig, model: Model) -> Objective:
    if config.training.objective == "dpo":
        return Dpo(model, config.training.dpo_beta)
    return Supervised(model)


def _own_losses(model: Any, example: Example, device: torch.device) -> torch.Tensor:
    """Of one document alone, by the model's own forward pass."""
    tokens = torch.from_numpy(example.tokens.astype(np.int64)).to(device)
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    return cross_entropy(logits[:-1].float(), tokens[1:], reduction="none")
