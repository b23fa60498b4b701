"""``GET /admin/v1/usage``."""

from __future__ import annotations

from pydantic import Field

from deployments.gateway.pagination import PageQuery
from deployments.gateway.schemas.base import Answer

BY = r"day|model|tenant|model_version|adapter_version"
DAY = r"^\d{4}-\d{2}-\d{2}$"


class UsageQuery(PageQuery):
    by: str = Field(
        default="day,model,tenant",
        pattern=rf"^({BY})(,({BY})){{0,4}}$",
        description="What there is a line for, with commas: `day`, `model`, `tenant`,"
        " `model_version`, `adapter_version`.",
    )
    tenant: str | None = Field(default=None, max_length=128)
    since: str | None = Field(default=None, pattern=DAY, description="First day, in UTC.")
    until: str | None = Field(default=None, pattern=DAY, description="Last day, in UTC.")


class UsageLine(Answer):
    day: str | None = None
    model: str | None = None
    tenant: str | None = None
    model_version: str | None = None
    adapter_version: str | None = None
    requests: int
    remembered_requests: int = Field(
        description="Of `requests`, those answered from the cache, or together with another."
    )
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    remembered_tokens: int = Field(
        description="Of answers that were not computed again, and are not paid for."
    )
    cost: float = Field(description="In `currency`.")


class UsageReport(Answer):
    currency: str
    lines: list[UsageLine]
