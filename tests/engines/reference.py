"""What an engine should answer, computed one request at a time with the model's own forward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from deployments.engines.sampler import SamplerState, sample
from deployments.engines.text import TextCodec, TextStream
from models.contracts import FinishReason, GenerateRequest, Sampling
from tests.tiny_models import CONTEXT

MANY_EOS = list(range(5, 256, 23))
"""So many that random models meet one soon."""


def with_many_eos(folder: Path, target: Path) -> Path:
    """The same model, for which more tokens end the sequence."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    path = target / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": MANY_EOS}))
    return target


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    text: str
    finish_reason: FinishReason


class Reference:
    """A model in float64, and the end of its sequences."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self._codec = TextCodec(folder)
        eos = self.model.generation_config.eos_token_id
        self._eos = {eos} if isinstance(eos, int) else set(eos)
        self._greedy = cache(self._greedy_to_the_end)
        self._drawn: dict[tuple[object, ...], tuple[SamplerState, list[int]]] = {}

    def generate(self, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
        """Exactly what a user of transformers calls, with the model's own end of sequence."""
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        return out[0, len(prompt) :].tolist()

    def answer(self, request: GenerateRequest, choice: int = 0) -> Answer:
        """What ``choice`` of the request is, its prompt being tokens."""
        prompt, sampling = request.prompt, request.sampling
        if sampling.temperature == 0:
            tokens = iter(self._greedy(prompt))
        else:
            tokens = self._draws(prompt, sampling, choice)
        return self._until_stop(islice(tokens, sampling.max_tokens), sampling)

    def _greedy_to_the_end(self, prompt: tuple[int, ...]) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=CONTEXT - len(prompt),
            do_sample=False,
            eos_token_id=-1,
        )
        return out[0, len(prompt) :].tolist()

    def _draws(self, prompt: tuple[int, ...], sampling: Sampling, choice: int) -> Iterator[int]:
        plain = replace(sampling, max_tokens=None, stop=(), stop_token_ids=(), ignore_eos=False)
        key = (prompt, repr(plain), choice)
        if key not in self._drawn:
            self._drawn[key] = SamplerState.start(plain, prompt, choice), []
        state, drawn = self._drawn[key]
        for i in range(CONTEXT - len(prompt)):
            if i == len(drawn):
                drawn.append(self._draw(state, [*prompt, *drawn]))
            yield drawn[i]

    @torch.inference_mode()
    def _draw(self, state: SamplerState, tokens: list[int]) -> int:
        logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1:]
        (row,) = sample(logits.clone(), [state])
        assert row.token is not None
        state.drew(row.token)
        return row.token

    def _until_stop(self, tokens: Iterator[int], sampling: Sampling) -> Answer:
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos)}
        text = TextStream(self._codec.decode, sampling.stop)
        taken: list[int] = []
        pieces: list[str] = []
        reason = FinishReason.LENGTH
        for token in tokens:
            taken.append(token)
            if token not in stops:
                pieces.append(text.push(token))
            if token in stops or text.stopped:
                reason = FinishReason.STOP
                break
        return Answer(taken, "".join([*pieces, text.finish()]), reason)
