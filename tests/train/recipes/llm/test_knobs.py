"""What a person sets is done to the very model that the loop trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.recipes.llm.experiment import config, train
from train.context import Context
from train.recipes.llm import LlmConfig, data, model
from train.recipes.llm.loop import Loop
from train.recipes.llm.parallel import layers_of

STILL = {"lora": {"dropout": 0}}
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


@contextmanager
def loop(settings: LlmConfig, out: Path) -> Iterator[Loop]:
    """As ``finetune`` makes it."""
    loaded = model.load(settings, torch.device("cpu"))
    prepared = data.load(settings, loaded.tokenizer)
    made = Loop(settings, Context(out=out), loaded, prepared.train, prepared.held_out)
    try:
        yield made
    finally:
        made.close()


def change(settings: LlmConfig, out: Path) -> float:
    """The norm of what a run changes of all trained weights."""
    with loop(settings, out) as made:
        before = {name: p.detach().clone() for name, p in made.model.trained().items()}
        made.run()
        after = made.model.trained()
        return float(
            torch.cat([(after[n].detach() - p).flatten() for n, p in before.items()]).norm()
        )


def test_a_clipped_update_is_as_long_as_the_limit_says(text: Path, tmp_path: Path) -> None:
    """One step of plain gradient descent: what changes is rate times gradient."""

    def norm(limit: float | None) -> float:
        optimiser = {"name": "sgd", "learning_rate": 0.5, "warmup": 0, "weight_decay": 0}
        settings = config(text, model=STILL, steps=1, clip_norm=limit, optimiser=optimiser)
        return change(settings, tmp_path) / 0.5

    free = norm(None)
    assert free > 0.1
    assert norm(10 * free) == pytest.approx(free, rel=1e-4), "nothing to clip"
    assert norm(free / 4) == pytest.approx(free / 4, rel=1e-3)
    assert norm(free / 100) == pytest.approx(free / 100, rel=1e-3)


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_activation_checkpointing_computes_every_layer_again(
    text: Path, tmp_path: Path, checkpointing: bool, times: int
) -> None:
    kind = STILL | {"activation_checkpointing": checkpointing}
    settings = config(text, model=kind, steps=1, batch_size=1)
    calls: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        def forward(module: nn.Module, *_: object) -> None:
            calls[name] += torch.is_grad_enabled()

        return forward

    with loop(settings, tmp_path) as made:
        network = made.model.causal_lm
        assert network.is_gradient_checkpointing is checkpointing
        for name, module in network.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_hook(count(name))
        made.run()
    assert list(calls.values()) == [times] * 2, "one step of two layers"


class Operations(TorchDispatchMode):
    """Names of all that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kernel", "flash"), [("auto", True), ("flash", True), ("math", False)])
def test_attention_is_computed_by_the_kernel_that_is_named(
    text: Path, tmp_path: Path, kernel: str, flash: bool
) -> None:
    settings = config(text, model=STILL | {"sdpa": kernel}, steps=1)
    with loop(settings, tmp_path) as made:
        assert made.model.causal_lm.config._attn_implementation.startswith("frontier_packed")
        with Operations() as computed:
            made.run()
    assert ((FLASH in computed.names), (f"{FLASH}_backward" in computed.names)) == (flash, flash)
    assert any("softmax" in name for name in computed.names - {"aten::_log_softmax"}) != flash


@pytest.mark.parametrize(("wanted", "set_to"), [(True, "high"), (False, "highest")])
def test_tf32_is_for_gpus_and_may_be_switched_off(
    text: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool, set_to: str
) -> None:
    """Of a GPU that is not here: the model stays where it is, the flag is the real one."""
    before, gpu = torch.get_float32_matmul_precision(), torch.device("cuda")
    settings = config(text, model={"tf32": wanted, "precision": "fp32"})
    try:
        torch.set_float32_matmul_precision("medium")
        model.load(settings, torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == "medium"
        real = nn.Module.to
        monkeypatch.setattr(
            nn.Module, "to", lambda self, *a, **k: self if a == (gpu,) else real(self, *a, **k)
        )
        model.load(settings, gpu)
        assert torch.get_float32_matmul_precision() == set_to
        assert torch.backends.cuda.matmul.allow_tf32 is wanted
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # its own, of its compiler
@pytest.mark.parametrize("wanted", [False, True])
def test_compilation_takes_the_layers_of_the_model_that_is_trained(
    text: Path, tmp_path: Path, wanted: bool
) -> None:
    with loop(config(text, model={"compile": wanted}), tmp_path) as made:
        layers = layers_of(made.model.causal_lm)
        assert [layer._compiled_call_impl is not None for layer in layers] == [wanted] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler about itself
def test_compiled_layers_are_run_and_give_the_same_losses(text: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    compiled = torch._dynamo.utils.counters["stats"]
    compiled.clear()
    _, expected = train(config(text, model=STILL, steps=3), tmp_path / "a")
    assert not compiled["unique_graphs"]
    _, losses = train(config(text, model=STILL | {"compile": True}, steps=3), tmp_path / "b")
    assert compiled["unique_graphs"] >= 1
    assert losses == pytest.approx(expected, abs=1e-5)
