"""The classifier that is shipped, on the real encoder and the sources that it has not seen."""

from __future__ import annotations

import pytest

from deployments.guardrails.safety import fit
from deployments.guardrails.safety.head import Head

pytestmark = [pytest.mark.weights, pytest.mark.timeout(1200)]


def test_precision_and_recall_are_those_of_the_documentation() -> None:
    """docs/guardrails.md has them with their counts; other machines may differ in a text or two."""
    report = fit.report(Head.load(), fit.encoder(threads=2))
    print(report)
    assert report.recall >= 0.33
    assert report.precision >= 0.8
    assert report.false_alarms <= 0.03
