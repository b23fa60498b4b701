"""A run from its configuration to its artifact."""

from __future__ import annotations

from collections.abc import Sequence

from train.recipe import Metrics, RunContext
from train.recipes.llm.callbacks import Callback
from train.recipes.llm.config import LlmConfig


def run(config: LlmConfig, context: RunContext) -> Metrics:
    return finetune(config, context)


def finetune(config: LlmConfig, context: RunContext, callbacks: Sequence[Callback] = ()) -> Metrics:
    """Fine-tune, and write the best weights to ``context.artifact``.

    Args:
        callbacks: called after those that the configuration names.
    """
    import torch

    from train.recipes.llm import callbacks as named
    from train.recipes.llm import data, model
    from train.recipes.llm.loop import Loop

    hooks = [*named.load(config.training.callbacks), *callbacks]
    device, base = torch.device(context.device), context.inputs.get("model.source")
    loaded = model.load(config, device, base)
    prepared = data.load(config, loaded.tokenizer)
    prepared.record(context)
    loop = Loop(config, context, loaded, prepared.train, prepared.held_out, hooks)
    try:
        metrics = loop.run()
        if context.workers.rank == 0:
            loaded.save(context.artifact, loop.best)
    finally:
        loop.close()
    return {**metrics, "rows_skipped": float(len(prepared.skipped))}
