"""``python -m deployments.launcher [CONFIG]``; ``scripts/serve`` sets its environment."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deployments.config import AuthConfig
from deployments.launcher import preflight, processes, read_ahead, status
from deployments.tenants.entrance import VARIABLE, needs_keys
from models.errors import ConfigError, PlatformError

BIN = Path(sys.executable).parent
"""Of this very environment: ``ray`` and ``serve``."""
DRAIN_S = 120.0
"""The configuration's ``drain_s`` end a drain; this one only if Serve does not keep to them."""


class Failed(PlatformError):
    """Ray or the platform has ended, or will never come up."""


def say(line: str) -> None:
    try:
        print(line, flush=True)
    except OSError:  # the terminal was closed; that must not keep us from stopping in order
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@dataclass(slots=True)
class Platform:
    """Ray and ``serve run`` on this machine, or ``serve run`` alone in a cluster that is given."""

    config: preflight.ServeFile
    env: dict[str, str]
    stopping: threading.Event = field(default_factory=threading.Event)
    hurry: threading.Event = field(default_factory=threading.Event)
    ray: subprocess.Popen[bytes] | None = None
    serve: subprocess.Popen[bytes] | None = None

    @property
    def logs(self) -> Path:
        return Path(self.env["FRONTIER_LOGS"])

    @property
    def dashboard(self) -> status.Dashboard:
        secret = status.token(self.env) if self.env.get("RAY_AUTH_MODE") == "token" else None
        return status.Dashboard(f"http://127.0.0.1:{self.env['FRONTIER_DASHBOARD_PORT']}", secret)

    def signalled(self, *_: object) -> None:
        """A wish to stop; the second one is impatient."""
        (self.hurry if self.stopping.is_set() else self.stopping).set()

    def start(self) -> None:
        """Raises:
        Failed: what went wrong, in the words of who noticed it.
        """
        began = time.monotonic()
        if not self.env.get("RAY_ADDRESS"):
            if self.config.platform is not None:
                read_ahead.start(self.config.platform)
            self._start_ray()
            say(f"ray       up after {time.monotonic() - began:.0f} s")
        self.serve = processes.spawn(
            [BIN / "serve", "run", self.config.path],
            log=self.logs / "serve.log",
            env=self.env,
            dies_with_us=signal.SIGINT,
        )
        self._until(lambda: status.is_ready(self.config.url))
        say(f"platform  ready after {time.monotonic() - began:.0f} s")

    def _start_ray(self) -> None:
        if self.env.get("RAY_AUTH_MODE") == "token" and status.token(self.env) is None:
            make_token = [f"{BIN}/ray", "get-auth-token", "--generate"]
            subprocess.run(make_token, check=True, capture_output=True)
        gcs, client, agent = _free_ports(3)
        self.ray = processes.spawn(
            [
                BIN / "ray",
                *("start", "--head", "--block", "--log-style=record", "--log-color=false"),
                f"--port={gcs}",
                f"--ray-client-server-port={client}",
                f"--dashboard-agent-listen-port={agent}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.env['FRONTIER_DASHBOARD_PORT']}",
                f"--metrics-export-port={self.env['FRONTIER_METRICS_PORT']}",
                "--object-store-memory=200000000",  # tensors stay inside the replicas
                f"--temp-dir={_temp_dir(self.env)}",
                *_num_cpus(self.env),
            ],
            log=self.logs / "ray.log",
            env=self.env,
            dies_with_us=signal.SIGTERM,
        )
        self._until(lambda: "Ray runtime started" in (self.logs / "ray.log").read_text())
        self.env["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"

    def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._check_alive()
            if self.serve is not None and (reason := self.dashboard.failure()):
                raise Failed(f"{reason}\nthe whole log is {self.logs / 'serve.log'}")
            if self.stopping.wait(0.3):
                raise InterruptedError

    def watch(self) -> None:
        """Until a wish to stop.

        Raises:
            Failed: Ray or ``serve run`` has ended by itself.
        """
        while not self.stopping.wait(1.0):
            self._check_alive()
            processes.reap_orphans()

    def _check_alive(self) -> None:
        for child, name in ((self.ray, "ray"), (self.serve, "serve")):
            if child is not None and child.poll() is not None:
                log = self.logs / f"{name}.log"
                reason = status.last_error(log.read_text(errors="replace"))
                reason = reason or f"{name} has ended by itself (status {child.returncode})"
                raise Failed(f"{reason}\nthe whole log is {log}")

    def stop(self) -> None:
        """Drain, then end what is ours and leave nothing behind."""
        if self.serve is not None:
            if self.stopping.is_set():
                say("stopping  running requests may finish; once more to stop at once")
                self._drain()
            # INT, for TERM would abort it; it has nothing left to cut.
            processes.stop(self.serve, by=signal.SIGINT, within_s=self._patience(30))
        if self.ray is not None:
            processes.stop(self.ray, by=signal.SIGTERM, within_s=self._patience(15))
        processes.sweep()

    def _patience(self, seconds: float) -> float:
        """For an orderly end; after a failure, or for a second signal, there is less."""
        return 0 if self.hurry.is_set() else seconds if self.stopping.is_set() else 3

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        if self.dashboard.applications():
            self.dashboard.withdraw(host=self.config.host, port=self.config.port)
        while self.dashboard.applications() and time.monotonic() < deadline:
            if self.hurry.wait(0.2):
                return


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _num_cpus(env: Mapping[str, str]) -> list[str]:
    """Ray counts the cores itself, unless it is told to believe in more or fewer."""
    count = env.get("FRONTIER_NUM_CPUS")
    return [f"--num-cpus={count}"] if count else []


def _temp_dir(env: Mapping[str, str]) -> Path:
    """Not Ray's default: a user's own ``ray.init()`` must not land in our cluster.

    Short, because paths of the sockets inside it are limited to 107 characters.
    """
    return Path(env.get("RAY_TMPDIR", "/tmp")) / f"frontier-run-{os.getuid()}"


def greeting(config: preflight.ServeFile, env: Mapping[str, str]) -> str:
    """Where everything is, and a first request."""
    lines = [
        f"API        {config.url}",
        f"Dashboard  http://localhost:{env['FRONTIER_DASHBOARD_PORT']}",
        f"Metrics    {config.url}/metrics",
        f"           http://localhost:{env['FRONTIER_METRICS_PORT']}/metrics (Ray's own)",
        f"Logs       {env['FRONTIER_LOGS']}",
    ]
    if env.get("RAY_AUTH_MODE") == "token":
        lines.insert(2, f"           asks for a token: {os.path.relpath(BIN)}/ray get-auth-token")
    auth = config.platform.gateway.auth if config.platform else AuthConfig()
    secured = needs_keys(auth, env)
    if not secured:
        lines += ["", "Open: whoever is on this machine may do everything. --secure asks for keys."]
    if config.chat_model:
        header = " -H 'authorization: Bearer KEY'" if secured else ""
        question = '[{"role":"user","content":"What is the capital of France?"}]'
        address = config.url.removeprefix("http://")
        lines += [
            "",
            f"curl {address}/v1/chat/completions -H 'content-type: application/json'{header} \\",
            f'  -d \'{{"model":"{config.chat_model}","messages":{question},"stream":true}}\'',
        ]
    return (
        "\n" + "\n".join(f"  {line}".rstrip() for line in [*lines, "", "Ctrl-C stops it."]) + "\n"
    )


def with_bin(env: Mapping[str, str]) -> dict[str, str]:
    """``python`` is this one for jobs, too, whose entry points are looked up on Ray's PATH."""
    return {**env, "PATH": os.pathsep.join([str(BIN), env.get("PATH", os.defpath)])}


def run(path: Path, env: dict[str, str]) -> None:
    """Serve ``path`` until a signal.

    Raises:
        ConfigError: before anything is started.
        Failed: afterwards; nothing is left running.
    """
    config = preflight.load(path)
    if not env.get("RAY_ADDRESS"):
        preflight.check_ports(preflight.ports(config, env))
    platform = Platform(config=config, env=env)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, platform.signalled)
    processes.adopt_orphans()
    try:
        platform.start()
        say(greeting(config, env))
        platform.watch()
    except InterruptedError:
        pass
    finally:
        platform.stop()
    say("stopped")


def _bootstrap(env: Mapping[str, str]) -> None:
    """Raises Failed: there is no administrator's key, and none could be made."""
    done = subprocess.run([sys.executable, "-m", "deployments.admin", "bootstrap"], env=env)
    if done.returncode:
        raise Failed("no administrator's key could be made; see above")


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/serve", description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=Path("serve_config.yaml"))
    parser.add_argument(
        "--secure", action="store_true", help="ask for API keys, and make an administrator's"
    )
    arguments = parser.parse_args(words)
    defaults = {
        "FRONTIER_DASHBOARD_PORT": "8265",
        "FRONTIER_METRICS_PORT": "9464",
        "FRONTIER_LOGS": ".cache/logs",
    }
    env = with_bin(defaults | os.environ)
    try:
        if arguments.secure:
            env[VARIABLE] = "keys"
            _bootstrap(env)
        run(arguments.config, env)
    except (ConfigError, Failed) as error:
        for line in error.message.splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
