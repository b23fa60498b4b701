"""A model that answers at once, so that what is measured is all that stands in front of it.

===========  =======================================================================
``build``    the platform as it is served, with such a model behind a Serve handle:
             ``import_path`` of a ``serve_config.yaml``
``bare``     the same gateway in a plain uvicorn, the model in its process: what is
             ours, without Ray and HAProxy
``upstream`` an OpenAI-compatible server of one answer, for a peer to ask
===========  =======================================================================
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any
from unittest.mock import patch

import orjson
from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments import replicas
from deployments.app import gateway, options
from deployments.caching.identity import identity
from deployments.config import GenerateModel, ModelConfig, parse
from deployments.gateway.services import ServedModel
from deployments.observability.accumulator import Accumulator
from deployments.replicas import GatewayReplica
from models.contracts import Delta, FinishReason, GenerateRequest, Sampling, Timings, Usage

MODEL = "instant"
ANSWER = "The capital of France is Paris."
TOKENS = tuple(range(7))
USAGE = Usage(prompt_tokens=64, completion_tokens=len(TOKENS))
NO_TIME = Timings(queue_s=0.0, prefill_s=0.0, ttft_s=0.0, decode_s=0.0, total_s=0.0)

PLAN = "bench"
ENOUGH = 1_000_000_000
ARGS: dict[str, Any] = {
    "models": {
        MODEL: {
            "task": "generate",
            "source": "./nowhere",
            "sha256": "0" * 64,  # what never changes may be cached
            "engine": {"context": 2048},
            "replicas": {"cpus": 0, "drain_s": 1},
        }
    },
    "gateway": {
        "replicas": {"cpus": 0, "drain_s": 1, "target_ongoing_requests": 256},
        "auth": {"mode": "keys"},
        "plans": {
            PLAN: {
                "requests_per_minute": ENOUGH,
                "requests_per_hour": ENOUGH,
                "requests_per_day": ENOUGH,
                "tokens_per_minute": ENOUGH,
                "tokens_per_day": ENOUGH,
                "concurrent_requests": 10_000,
                "budget_per_month": ENOUGH,
            }
        },
        "prices": {MODEL: {"input_per_million": 0.05, "output_per_million": 0.15}},
        "guardrails": {
            "max_prompt_chars": 20_000,
            "categories": {"competitors": {"words": ["Acme Corporation", "Initech", "Umbrella"]}},
            "pii": {
                kind: {"input": "mask", "output": "mask"}
                for kind in ("email", "card", "iban", "national_id", "ip", "phone")
            },
        },
        "cache": {"enabled": True},
    },
}
"""Every policy, and limits that nobody reaches."""


class Instant:
    """A ``Generator``."""

    def __init__(self, answered_by: str | None) -> None:
        self._answered_by = answered_by

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Delta]:
        """See ``models.contracts.Generator``."""
        for index in range(request.n):
            last = index == request.n - 1
            yield Delta(
                index=index,
                text=ANSWER,
                token_ids=TOKENS,
                finish_reason=FinishReason.STOP,
                usage=USAGE if last else None,
                timings=NO_TIME if last else None,
                answered_by=self._answered_by if last else None,
            )


class InstantReplica(Instant):
    """In the place of ``deployments.replicas.GeneratorReplica``."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(identity(GenerateModel.model_validate(config)))

    async def answer(self, request: GenerateRequest) -> list[Delta]:
        return [delta async for delta in self.generate(request)]

    async def ping(self) -> None:
        """Answers while the replica can take requests."""


def build(args: Mapping[str, Any]) -> Application:
    """As ``deployments.app.build``, for models that generate."""
    config = parse(args)
    models = {
        name: serve.deployment(InstantReplica, name=name)
        .options(**options(model.replicas))
        .bind(model.model_dump(mode="json"))
        for name, model in config.models.items()
    }
    return gateway(config.gateway.replicas).bind(config.model_dump(mode="json"), models)


class BareGateway(GatewayReplica):
    """The gateway's shell, with models of its own in place of handles."""

    def _served(self, name: str, model: ModelConfig, created: int) -> ServedModel:
        assert isinstance(model, GenerateModel)
        return ServedModel(
            name=name,
            task="generate",
            created=created,
            generator=Instant(identity(model)),
            sampling=Sampling(**model.sampling.model_dump()),
            context=model.engine.context,
            identity=identity(model),
        )


def bare() -> ASGIApp:
    """For ``uvicorn --factory``. Events are counted as in a replica, and handed to nobody."""
    config = parse(ARGS).model_dump(mode="json")
    with patch.multiple(
        replicas, _observers=lambda: Accumulator().emit, bind_host=lambda: "127.0.0.1"
    ):
        return BareGateway(config, {}).__serve_build_asgi_app__()


async def upstream(scope: Scope, receive: Receive, send: Send) -> None:
    """``POST /v1/chat/completions`` of an OpenAI-compatible server, whatever is asked."""
    while (await receive()).get("more_body", False):
        pass
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(UPSTREAM_ANSWER)),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": UPSTREAM_ANSWER})


UPSTREAM_ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 1_764_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": ANSWER},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": USAGE.prompt_tokens,
            "completion_tokens": USAGE.completion_tokens,
            "total_tokens": USAGE.prompt_tokens + USAGE.completion_tokens,
        },
    }
)
