"""Most weights set to zero, the smallest first, and the rest trained on."""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from train.recipes.compression.fit import fit


def pruned(
    net: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    sparsity: float,
    epochs: int,
    learning_rate: float,
    seed: int,
) -> tuple[nn.Module, nn.Module]:
    """Copies of ``net`` with ``sparsity`` of all weights at zero: as cut, and trained on.

    Magnitude pruning over all layers at once, biases spared (Han et al. 2015, Learning both
    Weights and Connections for Efficient Neural Networks).
    """
    cut, tuned = _masked(net, sparsity), _masked(net, sparsity)
    fit(
        tuned,
        pixels,
        lambda logits, rows: functional.cross_entropy(logits, labels[rows]),
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        batch_size=64,
        shift=2,
    )
    return _settled(cut), _settled(tuned)


def share_of_zeros(net: nn.Module) -> float:
    weights = [layer.weight for layer in weighted(net)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def weighted(net: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def _masked(net: nn.Module, sparsity: float) -> nn.Module:
    net = copy.deepcopy(net)
    layers = [(layer, "weight") for layer in weighted(net)]
    gone = math.ceil(sparsity * sum(layer.weight.numel() for layer, _ in layers))
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=gone)
    return net


def _settled(net: nn.Module) -> nn.Module:
    """Masks become zeros."""
    for layer in weighted(net):
        prune.remove(layer, "weight")
    return net.eval()
