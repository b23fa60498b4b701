"""The composition root: ``serve_config.yaml`` names ``build``, and everything meets here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.config import EmbedModel, GenerateModel, Replicas, parse
from deployments.replicas import EmbedderReplica, GatewayReplica, GeneratorReplica


def build(args: Mapping[str, Any]) -> Application:
    """``args`` of the configuration file → the application.

    Raises:
        ConfigError: naming the key, the value and what was expected.
    """
    config = parse(args)
    generators: dict[str, tuple[Application, int | None]] = {}
    embedders: dict[str, Application] = {}
    for name, model in config.models.items():
        match model:
            case GenerateModel():
                deployment = serve.deployment(GeneratorReplica, name=name)
                bound = deployment.options(**options(model.replicas)).bind(name, identity(model))
                generators[name] = (bound, model.engine.context)
            case EmbedModel():
                deployment = serve.deployment(EmbedderReplica, name=name).options(
                    user_config=model.batcher.model_dump(mode="json"), **options(model.replicas)
                )
                embedders[name] = deployment.bind(name, identity(model))
    ingress = serve.deployment(serve.ingress()(GatewayReplica), name="gateway")
    return ingress.options(**options(config.gateway.replicas)).bind(
        config.gateway.model_dump(mode="json"), generators, embedders
    )


def identity(model: GenerateModel | EmbedModel) -> dict[str, Any]:
    """What a replica is made of: a change here replaces replicas.

    The number of replicas changes without that, and so does the batcher through
    ``user_config``; only which batcher it is cannot.
    """
    dumped = model.model_dump(mode="json")
    dumped["replicas"] = {"cpus": model.replicas.cpus}
    if isinstance(model, EmbedModel):
        dumped["batcher"] = {"kind": model.batcher.kind}
    return dumped


def options(replicas: Replicas) -> dict[str, Any]:
    """Serve's deployment options for a ``Replicas`` section."""
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.target_ongoing_requests,
            "upscale_delay_s": replicas.upscale_delay_s,
            "downscale_delay_s": replicas.downscale_delay_s,
            "metrics_interval_s": replicas.metrics_interval_s,
            "look_back_period_s": max(2 * replicas.metrics_interval_s, 2.0),
        },
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        "graceful_shutdown_timeout_s": replicas.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_surge_percent": replicas.max_surge_percent,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
    }
