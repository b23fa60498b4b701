"""``POST /webhooks/ingest``, and the events that came so."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field

from deployments.gateway.schemas.base import Answer, Strict

Visible: TypeAlias = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[!-~]+$")]
"""ASCII without blanks and control characters, as identifiers are."""


def _as_text(value: Any) -> str:
    """Whole numbers of any length stay what they are, which orjson would refuse."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:  # Python's parser takes NaN, and makes an infinity of 1e400
        raise ValueError("should hold finite numbers only") from None


JsonText: TypeAlias = Annotated[Any, AfterValidator(_as_text)]
"""Any JSON, as its text from here on."""


class WebhookRequest(Strict):
    id: Visible = Field(description="The event's. Its delivery is known by it, without a key.")
    type: Visible = Field(description="What happened, as the source calls it.")
    payload: JsonText = Field(description="Any JSON; kept as it is.")


class WebhookAccepted(Answer):
    id: str
    duplicate: bool = Field(description="True: it was here already, and is kept once.")
    received: datetime = Field(description="When it came for the first time.")


class WebhookEvent(Answer):
    id: int = Field(description="Ours; the later an event came, the larger.")
    tenant: str
    source: str
    key: str = Field(description="The delivery's: its `Idempotency-Key`, or the event's id.")
    event_id: str
    type: str
    payload: Any
    body_sha256: str
    signed: datetime
    received: datetime


class WebhookEvents(Answer):
    events: list[WebhookEvent]
