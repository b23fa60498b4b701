"""What becomes of a configuration's ``replicas``: Serve's own options, for gateway and models."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve import Application, Deployment

from deployments.app import build
from deployments.observability import traces

pytestmark = pytest.mark.filterwarnings("ignore:The `metrics_interval_s` field:DeprecationWarning")

REPLICAS: dict[str, Any] = {
    "min": 2,
    "max": 5,
    "target_ongoing_requests": 7,
    "upscale_delay_s": 3,
    "downscale_delay_s": 90,
    "metrics_interval_s": 4,
    "max_ongoing_requests": 123,
    "drain_s": 11,
    "max_surge_percent": 0,
    "cpus": 0.5,
    "gpus": 0.25,
}


def deployments(application: Application) -> dict[str, Deployment]:
    """By name: the ingress, and those it is bound to."""
    ingress = application._bound_deployment
    _, models = ingress.init_args
    return {
        "gateway": ingress,
        **{name: model._bound_deployment for name, model in models.items()},
    }


@pytest.mark.parametrize("name", ["gateway", "talk", "vectors"])
def test_serve_is_told_what_the_configuration_says(name: str) -> None:
    models: dict[str, Any] = {
        "talk": {"task": "generate", "source": "./a"},
        "vectors": {"task": "embed", "source": "./b"},
    }
    args: dict[str, Any] = {"models": models, "gateway": {}}
    (args["gateway"] if name == "gateway" else models[name])["replicas"] = REPLICAS
    deployment = deployments(build(args))[name]
    scaling = deployment._deployment_config.autoscaling_config
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)
    assert scaling.get_target_ongoing_requests() == 7
    assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (3, 90)
    assert (scaling.metrics_interval_s, scaling.look_back_period_s) == (4, 8)
    config = deployment._deployment_config
    assert config.max_ongoing_requests == 123
    assert config.graceful_shutdown_timeout_s == 11
    assert config.max_surge_percent == 0
    options = deployment.ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (0.5, 0.25)
    assert deployment.name == name


def variables(deployment: Deployment) -> dict[str, str]:
    """That Serve reads in the deployment's replicas alone."""
    environment: dict[str, str] = deployment.ray_actor_options.get("runtime_env", {}).get(
        "env_vars", {}
    )
    return environment


def test_every_replica_traces_where_traces_have_a_place_to_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = {"models": {"talk": {"task": "generate", "source": "./a"}}}
    without = deployments(build(args))
    assert not variables(without["talk"])
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    traced = deployments(build(args))
    assert traces.SERVE_EXPORTER in variables(traced["talk"])
    assert variables(traced["gateway"]) == (
        variables(without["gateway"]) | variables(traced["talk"])
    )
