"""Which sources there are: the configuration's, and one by the environment alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.config import WebhooksConfig, WebhookSource, parse
from deployments.webhooks.sources import Sources
from models.errors import ConfigError, NotFound

SECRET, OTHER = "of-16-characters-or-more", "another-of-16-characters"
STRIPE = WebhooksConfig(sources={"stripe": WebhookSource(secrets="${STRIPE}", tenant="acme")})
MODEL = {"task": "generate", "source": "./model"}


def test_each_source_has_its_own_secrets_and_tenant(tmp_path: Path) -> None:
    (tmp_path / "github").write_text(f"{OTHER}\n{SECRET}\n")
    github = WebhookSource(secrets=f"file:{tmp_path}/github", tenant="labs")
    config = WebhooksConfig(sources={**STRIPE.sources, "github": github})
    sources = Sources.of(config, {"STRIPE": SECRET})
    assert sources.find("stripe").tenant == "acme"
    assert sources.find("stripe").secrets() == (SECRET.encode(),)
    assert sources.find("github").tenant == "labs"
    assert sources.find("github").secrets() == (OTHER.encode(), SECRET.encode())
    assert SECRET not in repr(sources)


def test_the_default_is_there_by_its_variable_alone() -> None:
    environ = {"FRONTIER_WEBHOOK_SECRETS": SECRET, "STRIPE": OTHER}
    default = Sources.of(WebhooksConfig(), environ).find("default")
    assert (default.name, default.tenant) == ("default", "public")
    assert default.secrets() == (SECRET.encode(),)
    assert Sources.of(STRIPE, environ).find("default").secrets() == (SECRET.encode(),)
    assert Sources.of(WebhooksConfig(tenant="acme"), environ).find("default").tenant == "acme"


def test_a_default_of_the_configuration_wins() -> None:
    config = WebhooksConfig(sources={"default": WebhookSource(secrets="${MINE}", tenant="acme")})
    sources = Sources.of(config, {"FRONTIER_WEBHOOK_SECRETS": SECRET, "MINE": OTHER})
    assert sources.find("default").secrets() == (OTHER.encode(),)


def test_without_secrets_there_is_none() -> None:
    with pytest.raises(NotFound, match="FRONTIER_WEBHOOK_SECRETS"):
        Sources.of(WebhooksConfig(), {}).find("default")
    with pytest.raises(NotFound, match="no source 'stripe'"):
        Sources().find("stripe")


def test_a_configured_source_without_secrets_stops_the_start() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.webhooks\.sources\.stripe: STRIPE is not set"):
        Sources.of(STRIPE, {})
    with pytest.raises(ConfigError, match="FRONTIER_WEBHOOK_SECRETS: expected secrets of 16"):
        Sources.of(WebhooksConfig(), {"FRONTIER_WEBHOOK_SECRETS": "short"})


def test_the_specification_is_the_default() -> None:
    webhooks = parse({"models": {"m": MODEL}}).gateway.webhooks
    assert (webhooks.window_s, webhooks.dedupe_s) == (300, 7 * 24 * 3600)


@pytest.mark.parametrize(
    ("webhooks", "key", "words"),
    [
        ({"sources": {"s": {"secrets": "hidden", "tenant": "a"}}}, "s.secrets", "${NAME}"),
        ({"sources": {"s": {"secrets": "hidden"}}}, "s.tenant", "required"),
        ({"sources": {"s": {"secrets": ["hidden"], "tenant": "a"}}}, "s.secrets", "string"),
        ({"sources": {"s": "hidden"}}, "sources.s", "dictionary"),
        ({"sources": {"s": {"secret": "hidden", "tenant": "a"}}}, "s.secret", "not permitted"),
        ({"sources": {"s": {"secrets": "${A}", "tenant": "A b"}}}, "s.tenant", "pattern"),
        ({"sources": {"A b": {"secrets": "${A}", "tenant": "a"}}}, "A b", "pattern"),
        ({"secrets": "hidden"}, "webhooks.secrets", "not permitted"),
        ({"window_s": 600, "dedupe_s": 1199}, "webhooks", "below twice window_s (600)"),
        ({"window_s": 0}, "window_s", "greater"),
    ],
)
def test_a_mistake_in_the_configuration_is_named_without_what_may_be_a_secret(
    webhooks: object, key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse({"models": {"m": MODEL}, "gateway": {"webhooks": webhooks}})
    assert key in refusal.value.message
    assert words in refusal.value.message
    assert "hidden" not in refusal.value.message
