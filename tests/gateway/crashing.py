"""A gateway in a process of its own, for tests that kill it: its model answers after ``DELAY_S``.

python -m tests.gateway.crashing DATABASE_URL PORT DELAY_S LEASE_S
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import uvicorn

from deployments.gateway.app import create_app
from deployments.gateway.policies import idempotency as policy
from deployments.tenants import idempotency as records
from state import patience
from state.database import Database
from tests.gateway.fakes import FakeGenerator, World


async def main(url: str, port: str, delay_s: str, lease_s: str) -> None:
    policy.LEASE_S = records.LEASE_S = float(lease_s)
    records.PATIENCE_S = patience.REQUEST_S = 30.0  # a busy machine is no database that is down
    world = World(generator=FakeGenerator(delay_s=float(delay_s)))
    async with await Database.open(url) as database:
        kept = records.IdempotencyRecords(database, ttl_s=3600)
        app = create_app(replace(world.services(), idempotency=kept))
        await uvicorn.Server(uvicorn.Config(app, port=int(port), log_level="warning")).serve()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
