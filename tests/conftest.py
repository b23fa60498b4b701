"""What holds for every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.log_lines import LogLines, written

# How long an example takes says more of the machine than of the code.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

BUDGETS = {
    "state.patience": "REQUEST_S",
    "deployments.tenants.idempotency": "PATIENCE_S",
    "deployments.tenants.identity": "PATIENCE_S",
    "deployments.tenants.meter": "PATIENCE_S",
}


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
