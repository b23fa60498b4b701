"""The tree of ``args`` in ``serve_config.yaml``: what is served and under which policy.

A person types this file, so unknown keys are errors, and an error names the key, the
value and what would be right. The numbers of the specification are the defaults here
and nowhere else. What changes at run time lives in the database, not in this tree.
"""

from __future__ import annotations

import math
from datetime import date
from functools import cached_property
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from deployments.guardrails import blocked
from deployments.guardrails.kinds import Action, PiiKind
from deployments.guardrails.patterns import automaton
from deployments.guardrails.safety.pieces import MOST_TOKENS as SAFETY_TOKENS
from deployments.tenants.secrets import EXPECTED as EXPECTED_REFERENCE
from deployments.tenants.secrets import REFERENCE
from models.contracts import Priority
from models.errors import ConfigError

ModelName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Also the name of a deployment, in logs, metrics and on the dashboard."""
PositiveSeconds: TypeAlias = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PriorityClass(Section):
    """One waiting room (spec B2). ``weight``: its share of the picks while all wait."""

    capacity: int = Field(ge=1)
    weight: int = Field(ge=1)
    timeout_s: PositiveSeconds
    """How long a request may wait to be started."""


class QueueConfig(Section):
    vip: PriorityClass = PriorityClass(capacity=100, weight=8, timeout_s=5)
    standard: PriorityClass = PriorityClass(capacity=1000, weight=4, timeout_s=30)
    low: PriorityClass = PriorityClass(capacity=500, weight=1, timeout_s=60)
    capacity: int | None = Field(default=None, ge=1)
    """Of all classes together: beyond it low requests make room for others (spec B3). As many as
    vip and standard may hold, and a fifth of low, unless given; it must be more than vip and
    standard hold, so that low ones are never shut out."""

    @model_validator(mode="after")
    def _leave_room_for_low(self) -> QueueConfig:
        higher = self.vip.capacity + self.standard.capacity
        if self.capacity is not None and self.capacity <= higher:
            raise ValueError(
                f"capacity is {self.capacity}; vip and standard may hold {higher} together, so"
                f" it must be {higher + 1} at least, or low requests are shut out"
            )
        return self

    @property
    def together(self) -> int:
        """Requests that may wait, whatever their class."""
        if self.capacity is not None:
            return self.capacity
        return self.vip.capacity + self.standard.capacity + math.ceil(self.low.capacity / 5)

    def classes(self) -> dict[Priority, PriorityClass]:
        return {Priority.VIP: self.vip, Priority.STANDARD: self.standard, Priority.LOW: self.low}


class Replicas(Section):
    """How many copies run, and when that changes (Serve's autoscaler)."""

    min: int = Field(default=1, ge=1)
    max: int = Field(default=1, ge=1)
    target_ongoing_requests: float = Field(default=16, gt=0)
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=120, ge=0)
    metrics_interval_s: PositiveSeconds = 2
    max_ongoing_requests: int = Field(default=2048, ge=1)
    """Far above the batch slots: waiting is done in our queue, which knows priorities."""
    drain_s: float = Field(default=30, ge=0)
    """How long a replica that is being stopped may finish what it has begun."""
    max_surge_percent: int = Field(default=100, ge=0, le=100)
    """Extra replicas while updating, so that the new one is up before the old one goes. 0: the
    old one goes first; for a machine without room for both."""
    cpus: float = Field(default=1, ge=0)
    gpus: float = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class AdapterLimits(Section):
    """LoRA adapters that a model serves beside itself, loaded while it runs."""

    memory_mb: float = Field(default=1024, gt=0)
    """Weights kept ready; the one unused for longest goes first, one in use never. Those of the
    running batch lie side by side in a copy that comes on top."""
    max_rank: int = Field(default=64, ge=1)


class PrefixCache(Section):
    """Keys and values that later requests with the same beginning use: system prompts, chats."""

    tokens: int = Field(default=4096, ge=0)
    """Kept beside the slots; 0: none."""
    shared: bool = False
    """Between tenants too. The time an answer takes then tells whether anybody else has sent the
    same beginning."""


class EngineConfig(Section):
    """The embedded engine: continuous batching for any Hugging Face causal LM."""

    slots: int = Field(default=32, ge=1, le=1024)
    """Sequences decoded together; each owns one contiguous KV slot."""
    context: int | None = Field(default=None, ge=16)
    """Tokens of prompt and output a sequence may have; default: what the model was trained for."""
    step_tokens: int = Field(default=256, ge=16)
    """Token budget of one step: what decoding leaves over is spent on prefill chunks."""
    stretch: float | None = Field(default=1.8, gt=1)
    """How many times as long a step may take as one that only decodes, for the prompts that it
    reads in meanwhile: streams do not stall, and long prompts begin later. None: no bound."""
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16", "int8"] = "float32"
    """auto: int8 on processors that have units for it, if the model then answers as well, which is
    found out at the first load (some seconds) and kept; bfloat16 on a GPU."""
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    """Torch threads; default: the replica's CPUs."""
    max_choices: int = Field(default=16, ge=1)
    """The largest ``n``."""
    preemption: bool = True
    """When a vip request waits for a slot, a low one makes room, once, and goes on later; and a
    vip prompt is read in alone, while all others wait for one step."""
    prefix_cache: PrefixCache = PrefixCache()
    adapters: AdapterLimits = AdapterLimits()


class SamplingDefaults(Section):
    """How a model draws where a request does not say; a small model needs a steadier hand."""

    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)


class GenerateModel(Section):
    """A chat or completion model."""

    task: Literal["generate"]
    source: str
    sha256: str | None = None
    engine: EngineConfig = EngineConfig()
    sampling: SamplingDefaults = SamplingDefaults()
    queue: QueueConfig = QueueConfig()
    replicas: Replicas = Replicas()


class BatchLimits(Section):
    """What may change while a model serves: Serve's ``user_config`` of its deployment."""

    max_batch_size: int = Field(default=32, ge=1)
    max_wait_s: float = Field(default=0.0, ge=0)
    """How long a first request waits for company while the model is idle."""


class BatcherConfig(BatchLimits):
    """Batching of a fixed-cost model. ``queue``: our priority queue, which takes all that
    waits when the previous batch ends; ``serve``: Ray Serve's ``@serve.batch``. Size and wait
    start as given here, unless ``user_config`` under ``deployments:`` says otherwise.
    """

    kind: Literal["queue", "serve"] = "queue"

    def limits(self) -> dict[str, float]:
        """The part that may change in place."""
        return self.model_dump(include=set(BatchLimits.model_fields))


class FixedCostModel(Section):
    """What every model that is a function of a batch has in common."""

    task: str
    source: str
    """A path, ``wheel:``, ``hf:``, or ``registry:NAME@ALIAS_OR_VERSION``. What an alias names is
    looked up every ``registry.refresh_s`` and exchanged while the model serves."""
    sha256: str | None = None
    threads: int | None = Field(default=None, ge=1)
    """Torch threads; default: the replica's CPUs, and one at least."""
    batcher: BatcherConfig = BatcherConfig()
    queue: QueueConfig = QueueConfig()
    replicas: Replicas = Replicas(cpus=0)


class EmbedModel(FixedCostModel):
    """A sentence encoder: mean pooling and L2 normalisation over its last hidden state."""

    task: Literal["embed"]
    max_tokens: int = Field(default=256, ge=8)
    """Longer inputs are an error, never cut in silence."""


class PredictModel(FixedCostModel):
    """A trained artifact that predicts; its manifest names what loads it."""

    task: Literal["predict"]

    @field_validator("source")
    @classmethod
    def _artifact(cls, source: str) -> str:
        if not source.startswith(("registry:", "path:", "/", "./", "../", "~")):
            raise ValueError(
                "expected registry:NAME@ALIAS_OR_VERSION or the folder of a sealed artifact"
            )
        return source

    max_inputs: int = Field(default=256, ge=1, le=4096)
    """Of one request."""
    max_input_bytes: int = Field(default=65_536, ge=1)
    """Of one input, as compact JSON."""


ModelConfig: TypeAlias = Annotated[
    GenerateModel | EmbedModel | PredictModel, Field(discriminator="task")
]


class RegistryConfig(Section):
    """How replicas keep up with the registry, where a model or an adapter comes from it."""

    refresh_s: PositiveSeconds = 2
    """A moved alias is served after at most this, and the time to load what it names."""
    heartbeat_s: PositiveSeconds = 60
    """How often a replica writes down which artifacts it serves."""


class Cors(Section):
    allow_origins: tuple[str, ...] = ()
    """Empty: no cross-origin use."""


CategoryName: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
MAX_OUTPUT_MATCH = 256
"""Characters. A stream holds back what could become a match, so a match has to have an end."""


class CategoryConfig(Section):
    r"""What is blocked under one name: ``words`` (also phrases; in any case), and ``patterns``.

    A pattern is a regular expression as Python writes it, without look-arounds and
    back-references: it is run in linear time. ``\d \w \s \b`` are about ASCII, ``^`` and
    ``$`` are the ends of lines, ``(?i)`` at its beginning ignores case.
    """

    words: tuple[Annotated[str, Field(pattern=r"\S", max_length=200)], ...] = ()
    patterns: tuple[str, ...] = ()
    input: Action = Action.REFUSE
    output: Action = Action.REFUSE

    @model_validator(mode="after")
    def _can_be_looked_for(self) -> CategoryConfig:
        if not self.words and not self.patterns:
            raise ValueError("expected words, patterns, or both")
        for rule in blocked.rules("category", self.words, self.patterns):
            automaton(rule.expression)
            if rule.pattern.width > MAX_OUTPUT_MATCH and self.output is not Action.ALLOW:
                raise ValueError(
                    f"a pattern for output may match {MAX_OUTPUT_MATCH} characters at most; write"
                    " {0,40} in place of * and {1,40} in place of +, or set output: allow"
                )
        return self


class PiiActions(Section):
    """About one kind of personal data, on its way to the model and on its way to the client."""

    input: Action = Action.ALLOW
    output: Action = Action.ALLOW


class SafetyConfig(Section):
    """A light classifier of what a model is asked to answer; docs/guardrails.md has its figures.

    Each prompt costs an embedding, or as many as it is long.
    """

    model: ModelName
    """One under ``models`` that embeds: all-MiniLM-L6-v2, whose vectors it was trained on."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """Lower: more is found, and more of it is harmless. Default: the one it was measured with."""
    on_hit: Literal["refuse", "reroute"] = "refuse"
    reroute_to: ModelName | None = None
    """Answers in place of the model that was asked; also the name in the answer and the bill."""
    on_failure: Literal["refuse", "allow"] = "refuse"
    """What happens to a prompt that cannot be checked; refused is 503."""
    patience_s: PositiveSeconds = 5
    """How long the vectors may take."""
    max_chars: int = Field(default=20_000, ge=1)
    """Of all messages together; what is longer is refused, since not all of it is read."""

    @model_validator(mode="after")
    def _knows_where_to(self) -> SafetyConfig:
        if (self.on_hit == "reroute") != (self.reroute_to is not None):
            raise ValueError("on_hit: reroute and reroute_to: MODEL go together")
        return self


class GuardrailsConfig(Section):
    """Checks of what goes in and comes out (spec C6); docs/guardrails.md has an example."""

    max_prompt_chars: int | None = Field(default=None, ge=1)
    """Of a prompt, or of all messages of a conversation together."""
    categories: dict[CategoryName, CategoryConfig] = Field(default_factory=dict)
    pii: dict[PiiKind, PiiActions] = Field(default_factory=dict)
    """A kind that is left out is allowed."""
    safety: SafetyConfig | None = None
    """Off unless it is here."""


class PlanConfig(Section):
    """What a tenant of this plan may use; a limit that is left out is none."""

    requests_per_minute: int | None = Field(default=None, ge=0)
    requests_per_hour: int | None = Field(default=None, ge=0)
    requests_per_day: int | None = Field(default=None, ge=0)
    tokens_per_minute: int | None = Field(default=None, ge=0)
    """Of prompts and answers together."""
    tokens_per_day: int | None = Field(default=None, ge=0)
    concurrent_requests: int | None = Field(default=None, ge=0)
    budget_per_month: float | None = Field(default=None, ge=0)
    """In the currency of the price list."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Of one continuation; asking for more is an error."""
    max_temperature: float | None = Field(default=None, ge=0, le=2)
    weight: int = Field(default=1, ge=1, le=1000)
    """Of a tenant's share of the tokens, while others of its priority wait too."""
    guardrails: GuardrailsConfig | None = None
    """In place of the gateway's."""

    NOT_COUNTED: ClassVar[frozenset[str]] = frozenset(
        {"max_new_tokens", "max_temperature", "weight", "guardrails"}
    )

    @cached_property
    def limits(self) -> tuple[tuple[str, float | None], ...]:
        """Those that are counted, and their names."""
        return tuple(self.model_dump(exclude=set(self.NOT_COUNTED)).items())


PLANS = {
    "free": PlanConfig(
        requests_per_minute=60,
        requests_per_hour=1000,
        requests_per_day=10_000,
        tokens_per_minute=50_000,
        tokens_per_day=1_000_000,
    ),
    "pro": PlanConfig(
        requests_per_minute=600,
        requests_per_hour=50_000,
        requests_per_day=500_000,
        tokens_per_minute=500_000,
        tokens_per_day=10_000_000,
    ),
    "enterprise": PlanConfig(
        requests_per_minute=6000,
        requests_per_hour=500_000,
        requests_per_day=10_000_000,
        tokens_per_minute=5_000_000,
        tokens_per_day=100_000_000,
    ),
}
"""Of the specification (C2)."""


class PriceConfig(Section):
    """Of a million tokens."""

    input_per_million: float = Field(default=0, ge=0)
    output_per_million: float = Field(default=0, ge=0)


class OidcConfig(Section):
    """An OpenID Connect issuer whose bearer tokens are taken beside API keys."""

    issuer: str = Field(pattern=r"^https?://")
    audience: str = Field(min_length=1)
    jwks_url: str | None = None
    """Default: what the issuer's ``/.well-known/openid-configuration`` says."""
    tenant_claim: str = "tenant"
    """Names a tenant that exists here."""
    role_claim: str = "role"
    """admin, operator, developer or auditor; without the claim: developer."""
    clock_skew_s: float = Field(default=30, ge=0, le=300)


class AuthConfig(Section):
    mode: Literal["open", "keys"] | None = None
    """``open``: everybody may do everything, and only this machine is answered. ``keys``: each
    request needs an API key, or a token of ``oidc``. Default: ``FRONTIER_AUTH``, else ``open``."""
    oidc: OidcConfig | None = None


class IdempotencyConfig(Section):
    """Answers to requests with an ``Idempotency-Key`` (spec C5)."""

    ttl_s: PositiveSeconds = 86_400
    """How long an answer is kept for whoever asks again."""
    max_body_bytes: int = Field(default=1_048_576, ge=0)
    """A longer answer is not kept: who asks again is answered anew."""


Slug: TypeAlias = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""The name of a tenant, or of a source of webhooks."""


class WebhookSource(Section):
    """Who delivers webhooks: its secrets, and whose events these are."""

    secrets: str
    """``${NAME}`` of an environment variable or ``file:/PATH``, newest first: see
    ``deployments/tenants/secrets.py``. Never the secrets themselves."""
    tenant: Slug

    @field_validator("secrets")
    @classmethod
    def _reference(cls, secrets: str) -> str:
        if REFERENCE.fullmatch(secrets) is None:
            raise ValueError(
                f"expected {EXPECTED_REFERENCE}; secrets themselves are not written here"
            )
        return secrets


class WebhooksConfig(Section):
    """Webhooks that come in at ``POST /webhooks/ingest`` (spec C4)."""

    sources: dict[Slug, WebhookSource] = Field(default_factory=dict)
    """By the name that ``X-Webhook-Source`` gives. Without an entry of its own ``default`` has the
    secrets of ``FRONTIER_WEBHOOK_SECRETS``; without those, too, there is none."""
    tenant: Slug = "public"
    """Of such a ``default``."""
    window_s: float = Field(default=300, gt=0, le=86_400)
    """How far a signature's time may be from ours, either way."""
    dedupe_s: float = Field(default=7 * 86_400, gt=0, le=10 * 366 * 86_400)
    """How long a delivery is known, and its event kept."""

    @model_validator(mode="after")
    def _replays_are_known(self) -> WebhooksConfig:
        if self.dedupe_s < 2 * self.window_s:
            raise ValueError(
                f"dedupe_s ({self.dedupe_s:g}) is below twice window_s ({self.window_s:g}): a copy"
                " could be taken for new while its signature is still good"
            )
        return self


Days: TypeAlias = Annotated[int, Field(ge=1, le=36_500)]


class RetentionConfig(Section):
    """For how many days what grows in the database is kept (spec C10); null: for ever.

    Answers to an ``Idempotency-Key`` and webhook events have times of their own.
    """

    access_days: Days | None = 30
    """Who asked: key or person, and request id, in each row of usage."""
    usage_days: Days | None = 400
    """Rows of usage: what last year's bills are made of."""
    audit_days: Days | None = 730
    """Entries of the audit log, and alerts."""
    dead_keys_days: Days | None = 365
    """API keys, after they were revoked or have expired."""
    every_s: PositiveSeconds = 3600
    """How often each gateway looks for what is due."""


class CacheConfig(Section):
    """Of answers that asking again would repeat: temperature 0 or a seed, and embeddings.

    Off unless wanted: what it holds are tenants' prompts' answers, which then lie on a disk;
    and a measurement that repeats its prompts would measure the cache. Where it lies:
    ``FRONTIER_CACHE_STORE``. Of models only whose source says exactly what it is: a version,
    a commit, a ``sha256``.
    """

    enabled: bool = False
    ttl_s: PositiveSeconds = 3600
    max_bytes: int = Field(default=268_435_456, ge=1)
    """Of all answers together; those unused for longest make room."""
    max_entry_bytes: int = Field(default=1_048_576, ge=1)
    """Of one answer; a longer one is not kept."""


PathPrefix: TypeAlias = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_~:@-][A-Za-z0-9._~:@-]*)+$")]
"""Of whole segments: ``/admin`` is ``/admin`` and all below it, not ``/administrator``."""


class PathsConfig(Section):
    """Which paths are answered at all (spec C7); nothing is at the others, for whoever asks."""

    allow: tuple[PathPrefix, ...] = ()
    """These and what is below them; empty: all that there is. Probes need ``/healthz`` and
    ``/readyz``."""
    deny: tuple[PathPrefix, ...] = ()
    """Not these, whatever ``allow`` says."""
    max_bytes: int = Field(default=2048, ge=64)
    """Of a path as it is sent."""
    max_query_bytes: int = Field(default=8192, ge=0)


class Deprecation(Section):
    """Of something that will go away. Dates in quotes: Serve takes its configuration as JSON."""

    since: date
    sunset: date | None = None
    """When it goes; ``None``: nobody knows yet."""
    successor: str | None = Field(default=None, pattern=r"^[!#-\[\]-~]+$")
    """What to use instead: a path or URL for a route, a name for a model or a field."""

    @model_validator(mode="after")
    def _ordered(self) -> Deprecation:
        if self.sunset is not None and self.sunset < self.since:
            raise ValueError(f"sunset ({self.sunset}) is before since ({self.since})")
        return self


class DeprecationsConfig(Section):
    """The one table of what is deprecated (spec A12): answers say so, and the OpenAPI document."""

    routes: dict[str, Deprecation] = Field(default_factory=dict)
    """By path, as the OpenAPI document writes it."""
    fields: dict[str, dict[str, Deprecation]] = Field(default_factory=dict)
    """Of requests that have them: by path, then by the field's name."""
    models: dict[ModelName, Deprecation] = Field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.routes or self.fields or self.models)


class GatewayConfig(Section):
    replicas: Replicas = Replicas(cpus=0, target_ongoing_requests=64, drain_s=5)
    paths: PathsConfig = PathsConfig()
    max_body_bytes: int = Field(default=1_048_576, ge=1024)
    body_timeout_s: PositiveSeconds = 30
    """For a whole body to arrive; a larger ``max_body_bytes`` needs more."""
    send_timeout_s: PositiveSeconds = 60
    """A client that takes nothing of its answer for so long is hung up on."""
    request_timeout_s: PositiveSeconds = 300
    """Hard limit from arrival to the last byte of the answer."""
    predict_timeout_s: PositiveSeconds = 30
    """The same for fixed-cost models."""
    compress_above_bytes: int = Field(default=8192, ge=0)
    sse_keepalive_s: PositiveSeconds = 15
    socket_requests: int = Field(default=32, ge=1)
    """Requests that one WebSocket connection may have running at a time."""
    socket_idle_s: PositiveSeconds = 300
    """A WebSocket connection on which nothing runs and nothing comes for so long is closed."""
    start_retries: int = Field(default=3, ge=0)
    """Attempts on another replica when one is lost before its first output."""
    cors: Cors = Cors()
    auth: AuthConfig = AuthConfig()
    idempotency: IdempotencyConfig = IdempotencyConfig()
    plans: dict[str, PlanConfig] = Field(default_factory=lambda: dict(PLANS), min_length=1)
    """By name, in place of free, pro and enterprise."""
    quota_strategy: Literal["fixed_window", "sliding_window", "token_bucket"] = "sliding_window"
    """How limits per minute, hour and day count: docs/tenants.md compares the three."""
    prices: dict[ModelName, PriceConfig] = Field(default_factory=dict)
    """By model; one that is not named costs nothing."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    guardrails: GuardrailsConfig = GuardrailsConfig()
    webhooks: WebhooksConfig = WebhooksConfig()
    retention: RetentionConfig = RetentionConfig()
    cache: CacheConfig = CacheConfig()
    deprecations: DeprecationsConfig = DeprecationsConfig()


class PlatformConfig(Section):
    models: dict[ModelName, ModelConfig] = Field(min_length=1)
    gateway: GatewayConfig = GatewayConfig()
    registry: RegistryConfig = RegistryConfig()

    @model_validator(mode="after")
    def _safety_has_its_models(self) -> PlatformConfig:
        guardrails = [self.gateway.guardrails, *(p.guardrails for p in self.gateway.plans.values())]
        for safety in [each.safety for each in guardrails if each is not None and each.safety]:
            encoder = self.models.get(safety.model)
            if not isinstance(encoder, EmbedModel) or encoder.max_tokens < SAFETY_TOKENS:
                raise ValueError(
                    f"safety.model is {safety.model!r}: expected the name of a model with task:"
                    f" embed and max_tokens of {SAFETY_TOKENS} or more"
                )
            target = safety.reroute_to
            if target is not None and not isinstance(self.models.get(target), GenerateModel):
                raise ValueError(
                    f"safety.reroute_to is {target!r}: expected the name of a model with task:"
                    " generate"
                )
        return self

    @model_validator(mode="after")
    def _names_are_free(self) -> PlatformConfig:
        if "gateway" in self.models:
            raise ValueError("a model cannot be named 'gateway': the gateway's deployment is")
        return self

    @model_validator(mode="after")
    def _deprecated_models_are_served(self) -> PlatformConfig:
        if strangers := sorted(self.gateway.deprecations.models.keys() - self.models.keys()):
            raise ValueError(
                f"gateway.deprecations.models names {', '.join(strangers)}, served here are"
                f" {', '.join(sorted(self.models))}"
            )
        return self


def parse(args: object) -> PlatformConfig:
    """Validate the ``args`` of the application.

    Raises:
        ConfigError: one line per mistake, with the path of the key, the value found and
            what was expected.
    """
    try:
        return PlatformConfig.model_validate(args)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in issue['loc'])}: {issue['msg']}" + _given(issue)
            for issue in error.errors()
        ]
        raise ConfigError("serve_config.yaml, args:\n" + "\n".join(lines)) from None


def _given(issue: ErrorDetails) -> str:
    """The value at fault; but not where somebody may have written a secret by mistake."""
    return "" if "webhooks" in issue["loc"] else f" (given: {issue['input']!r:.80})"
