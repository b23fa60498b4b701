from __future__ import annotations

from tests.gateway.conftest import app, server, world

__all__ = ["app", "server", "world"]
