"""Fine-tuning of causal language models: full, LoRA, QLoRA; supervised and DPO.

    rows ─ encoding ─ split ─► units ─ packing ─► batches ─ objective ─ loop ─► best weights
    (files, named data)        (tokens, targets)            (attention, loss)

``config`` is what a person sets, ``model`` what is loaded and saved, ``parallel`` how
several workers share it, ``checkpoint`` what survives an interruption.
"""

from __future__ import annotations

from train.recipe import Gate, Recipe
from train.recipes.llm.config import (
    DataConfig,
    LlmConfig,
    LoggingConfig,
    ModelConfig,
    OptimiserConfig,
    TrainingConfig,
)
from train.recipes.llm.finetune import run
from train.space import Choice, Float

__all__ = ["RECIPE", "LlmConfig"]

RECIPE = Recipe(
    name="llm",
    summary="fine-tune a causal language model: LoRA, QLoRA or all weights; supervised or DPO",
    kind="causal-lm",
    config=LlmConfig,
    run=run,
    gates={
        "perplexity_ratio": Gate(
            at_most=0.8, baseline="1: the base model on the same held-out rows"
        )
    },
    smoke=LlmConfig(
        model=ModelConfig(source="tiny"),
        training=TrainingConfig(
            steps=12,
            batch_size=4,
            sequence_length=128,
            optimiser=OptimiserConfig(learning_rate=2e-2),
            checkpoint_every=6,
        ),
        data=DataConfig(evaluation_tokens=2048),
        logging=LoggingConfig(every=2),
    ),
    smoke_gates={
        "perplexity_ratio": Gate(
            at_most=0.9, baseline="1: the same random model of bytes, untrained"
        )
    },
    bases=("model.source",),
    licence="",
    parallel=True,
    space={
        "training.optimiser.learning_rate": Float(low=2e-5, high=2e-3, log=True),
        "training.optimiser.schedule": Choice(("constant", "linear", "cosine", "wsd")),
        "model.lora.r": Choice((4, 8, 16, 32)),
    },
    data="by configuration; default: pydoc_data.topics of the Python standard library, PSF-2.0",
)
