"""What holds for every test."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import register_random, settings

from tests.log_lines import LogLines, written
from tests.unhurried import key, listed

# How long an example takes says more of the machine than of the code.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

BUDGETS = {
    "state.patience": "REQUEST_S",
    "deployments.tenants.idempotency": "PATIENCE_S",
    "deployments.tenants.identity": "PATIENCE_S",
    "deployments.tenants.meter": "PATIENCE_S",
}

SERVERS = {"postgres", "postgres_url", "redis_server", "s3_server"}
"""Fixtures that start one."""
KINDS = {"postgres", "redis", "s3"}
"""Values of parameters that ask for them."""
ATTACKS = Path(__file__).parent / "attacks"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """What is held against a server, attacks, or takes its time is ``integration``, whatever its
    file says.
    """
    unhurried = listed()
    for item in items:
        called = getattr(item, "callspec", None)
        values = called.params.values() if called is not None else ()
        if (
            SERVERS & set(item.fixturenames)
            or KINDS & {value for value in values if isinstance(value, str)}
            or item.path.is_relative_to(ATTACKS)
            or key(item.nodeid) in unhurried
        ):
            item.add_marker(pytest.mark.integration)


class TorchsChance:
    """torch's, for Hypothesis: an example that fails is the same when it is tried again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCHS_CHANCE = TorchsChance()
register_random(TORCHS_CHANCE)  # which holds no reference of its own


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws is the same in every run and order: one that fails can be repeated."""
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def time_enough(request: pytest.FixtureRequest) -> Iterator[None]:
    """State that is slow because the machine is busy is a matter of the tests marked ``outage``."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("outage") is None:
            for name, budget in BUDGETS.items():
                if (module := sys.modules.get(name)) is not None:
                    patch.setattr(module, budget, 30.0)
        yield


@pytest.fixture
def log() -> Iterator[LogLines]:
    """All that is logged meanwhile, line by line as it is written."""
    with written() as lines:
        yield lines
