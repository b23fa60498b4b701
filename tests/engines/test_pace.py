"""How many prompt tokens a step may take, on machines that are simulated."""

from __future__ import annotations

import random

import pytest

from deployments.engines.pace import FEWEST, Pace


class Machine:
    """A step takes a fixed time, and more for each token."""

    def __init__(self, step_s: float, decode_s: float, prompt_s: float, noise: float = 0.0) -> None:
        self.step_s, self.decode_s, self.prompt_s, self.noise = step_s, decode_s, prompt_s, noise
        self._draw = random.Random(1)

    def seconds(self, decode: int, prompt: int) -> float:
        exact = self.step_s + decode * self.decode_s + prompt * self.prompt_s
        return exact * self._draw.uniform(1 - self.noise, 1 + self.noise)

    def run(self, pace: Pace, decode: int, prompt: int) -> float:
        seconds = self.seconds(decode, prompt)
        pace.measured(decode_tokens=decode, prefill_tokens=prompt, seconds=seconds)
        return seconds


LAPTOP = (0.008, 0.0006, 0.0005)
GPU = (0.012, 0.00002, 0.00001)


@pytest.mark.parametrize("streams", [1, 8, 32])
@pytest.mark.parametrize("costs", [LAPTOP, GPU], ids=["laptop", "gpu"])
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_a_long_prompt_stretches_steps_no_further_than_wanted(
    costs: tuple[float, float, float], streams: int, noise: float
) -> None:
    machine, pace = Machine(*costs, noise=noise), Pace(1.8)
    machine.run(pace, 0, 37)  # the first prompt: there is no stream yet
    for _ in range(20):
        machine.run(pace, streams, 0)
    beat = machine.step_s + streams * machine.decode_s
    stretched = []
    for _ in range(60):
        tokens = pace.prompt_tokens(2000)
        stretched.append((machine.run(pace, streams, tokens) / beat, tokens))
    settled = stretched[30:]
    least = 1 + FEWEST * machine.prompt_s / beat
    assert max(ratio for ratio, _ in settled) <= max(1.8, least) * (1.001 + 2 * noise)
    mean = sum(ratio for ratio, _ in settled) / len(settled)
    assert mean >= min(1.8, 1 + 2000 * machine.prompt_s / beat) * 0.85, "it could read in more"


def test_without_a_bound_or_a_measurement_a_step_takes_all() -> None:
    assert Pace(None).prompt_tokens(256) == 256
    assert Pace(1.8).prompt_tokens(256) == 256


def test_prompts_come_to_an_end_on_any_machine() -> None:
    machine, pace = Machine(0.001, 0.0, 1.0), Pace(1.1)
    machine.run(pace, 0, 10)
    machine.run(pace, 1, 0)
    assert pace.prompt_tokens(256) == FEWEST
    assert pace.prompt_tokens(5) == 5


def test_it_follows_a_machine_that_changes() -> None:
    """More streams, a hotter processor, a neighbour: no measurement is for ever."""
    pace = Pace(1.8)
    before, after = Machine(*LAPTOP), Machine(0.016, 0.0012, 0.001)
    for machine in (before, after):
        machine.run(pace, 0, 100)
        for _ in range(60):
            machine.run(pace, 8, 0)
            ratio = machine.run(pace, 8, pace.prompt_tokens(256)) / machine.seconds(8, 0)
        assert ratio == pytest.approx(1.8, abs=0.1)
