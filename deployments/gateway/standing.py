"""How a request stands beside others that wait for a model."""

from __future__ import annotations

from deployments.gateway.exchange import Exchange
from deployments.gateway.services import Services
from models.contracts import Priority, Standing


def standing(services: Services, exchange: Exchange) -> Standing:
    """By its tenant's plan, its priority and what is left of its deadline, now."""
    plan = None if exchange.plan is None else services.config.plans.get(exchange.plan)
    left_s = None if exchange.deadline is None else exchange.deadline - services.clock()
    return Standing(
        tenant=exchange.tenant,
        weight=1 if plan is None else plan.weight,
        priority=exchange.priority or Priority.STANDARD,
        timeout_s=left_s,
    )
