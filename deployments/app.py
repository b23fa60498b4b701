"""The composition root: ``serve_config.yaml`` names ``build``, and everything meets here.

Serve replaces replicas when ``args`` change, one after the other. What changes in place goes
through Serve's own ``deployments:`` section: ``user_config`` (batch size and wait of a
fixed-cost model) and ``autoscaling_config``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application, Deployment

from deployments.config import FixedCostModel, Replicas, parse
from deployments.ingress import HOOK, middlewares
from deployments.observability.traces import serve_environment
from deployments.replicas import GatewayReplica, GeneratorReplica, PredictorReplica


def build(args: Mapping[str, Any]) -> Application:
    """``args`` of the configuration file → the application.

    Raises:
        ConfigError: naming the key, the value and what was expected.
    """
    config = parse(args)
    models: dict[str, Application] = {}
    for name, model in config.models.items():
        shell = PredictorReplica if isinstance(model, FixedCostModel) else GeneratorReplica
        deployment = serve.deployment(shell, name=name).options(**options(model.replicas))
        if isinstance(model, FixedCostModel):
            deployment = deployment.options(user_config=model.batcher.limits())
        models[name] = deployment.bind(
            name, model.model_dump(mode="json"), config.registry.model_dump(mode="json")
        )
    return gateway(config.gateway.replicas).bind(config.model_dump(mode="json"), models)


def gateway(replicas: Replicas) -> Deployment:
    """Where HTTP comes in."""
    hook = {HOOK: f"{middlewares.__module__}:{middlewares.__name__}"}
    chosen = options(replicas, hook)
    return serve.deployment(serve.ingress()(GatewayReplica), name="gateway").options(**chosen)


def options(replicas: Replicas, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Serve's deployment options for a ``Replicas`` section.

    Args:
        env: variables that only these replicas have.
    """
    env_vars = {**serve_environment(os.environ), **(env or {})}
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
        "ray_actor_options": {
            "num_cpus": replicas.cpus,
            "num_gpus": replicas.gpus,
            **({"runtime_env": {"env_vars": env_vars}} if env_vars else {}),
        },
        "graceful_shutdown_timeout_s": replicas.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_surge_percent": replicas.max_surge_percent,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        # Serve would write a line for each request into files of its own, with its path and
        # whose it was. What is known of a request is in the metrics and the ledger. The switch
        # for it only hides the line; a level above it spares making it.
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }
