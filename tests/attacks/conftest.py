from __future__ import annotations

from tests.gateway.conftest import app, client, contract, world

__all__ = ["app", "client", "contract", "world"]
