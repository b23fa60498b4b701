"""What the gateway costs: every policy in front of a model that answers at once.

``python -m benchmarks.gateway``

Three are loaded in turn by ``wrk``, round after round, with 1 client and with 32:

- the platform as it is served (HAProxy, one gateway replica, a Serve handle to the model);
- the same gateway in a plain uvicorn, which shows what Serve adds;
- LiteLLM's proxy, one worker, in front of an OpenAI-compatible server of the same answer, in a
  virtual environment of its own that the first run makes.

Ours checks an API key of the directory, reserves and settles seven limits in counters on the
disk, screens prompt and answer for personal data and blocked words, looks into the cache of
answers (each prompt is new: a miss, and one more entry), and writes every request into the usage
ledger. LiteLLM checks its master key, and has no database.

``--memory`` sends 200 000 requests to the platform instead, and plots what the gateway's process
keeps in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import yaml

from benchmarks.instant import ARGS, MODEL, PLAN
from benchmarks.report import Report, table
from deployments.launcher.background import REPOSITORY, serving
from models.sources import default_cache

LITELLM = "1.105.0"
CLIENTS = (1, 32)
START_TIMEOUT_S = 180.0
FIXED_PORTS = (
    "FRONTIER_DASHBOARD_PORT",
    "FRONTIER_METRICS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
SEGMENT_S = 5
"""Between two looks at the memory."""
FLAT = 0.05

OURS, BARE, PEER = "served", "bare uvicorn", f"LiteLLM {LITELLM}"

SCRIPT = """
-- Every prompt is another one: nothing is answered from a cache.
local key, prefix, number = os.getenv("BENCH_KEY"), os.getenv("BENCH_PREFIX"), 0
local headers = {["content-type"] = "application/json", ["authorization"] = "Bearer " .. key}
local body = '{"model":"MODEL","max_tokens":16,"temperature":0,"messages":[' ..
  '{"role":"system","content":"You answer in one short sentence, or say that you do not know."},' ..
  '{"role":"user","content":"A traveller, number %s-%d, has come by train, has three days and ' ..
  'little money, and would like to see what the people of the country are proud of. Which ' ..
  'city should she go to first, and what is the capital of France?"}]}'
function request()
  number = number + 1
  return wrk.format("POST", "/v1/chat/completions", headers, string.format(body, prefix, number))
end
function done(summary, latency, _)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests":%d,"seconds":%f,"p50":%f,"p99":%f,"errors":%d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
""".replace("MODEL", MODEL)


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of ``wrk``; milliseconds."""

    requests: int
    seconds: float
    p50: float
    p99: float
    errors: int

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that answers ``/v1/chat/completions``."""

    name: str
    url: str
    key: str = field(repr=False)
    processes: Callable[[], Sequence[psutil.Process]]
    """Those that a client's request goes through, the model left out."""

    def rss_mb(self) -> float:
        return sum(process.memory_info().rss for process in self.processes()) / 1e6


class Wrk:
    """Args:
    folder: for the script.
    """

    def __init__(self, folder: Path) -> None:
        self._script = folder / "chat.lua"
        self._script.write_text(SCRIPT)

    def run(self, target: Target, *, clients: int, seconds: float) -> Sample:
        command = [
            "wrk",
            "--threads=1",
            f"--connections={clients}",
            f"--duration={seconds:.0f}s",
            "--timeout=10s",
            f"--script={self._script}",
            target.url,
        ]
        env = {**os.environ, "BENCH_KEY": target.key, "BENCH_PREFIX": a_word()}
        told = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        _, found, result = told.partition("RESULT ")
        if not found:
            raise RuntimeError(f"wrk said nothing of use:\n{told}")
        return Sample(**json.loads(result))


def a_word() -> str:
    """Of letters, which nothing takes for a telephone number."""
    return "".join([secrets.choice("bcdfghjklm") for _ in range(12)])


# Who is measured


@contextmanager
def platform(folder: Path) -> Iterator[Target]:
    """As ``scripts/serve`` starts it, with ``benchmarks.instant`` in place of the models."""
    http, *others = free_ports(1 + len(FIXED_PORTS))
    document = {
        "http_options": {"host": "127.0.0.1", "port": http},
        "applications": [
            {
                "name": "frontier-run",
                "route_prefix": "/",
                "import_path": "benchmarks.instant:build",
                "args": ARGS,
            }
        ],
    }
    config = folder / "serve_config.yaml"
    config.write_text(yaml.safe_dump(document))
    state = state_of(folder / "served")
    ports = {name: str(port) for name, port in zip(FIXED_PORTS, others, strict=True)}
    key = a_key(state)
    with serving(config, env={**state, **ports, "PYTHONPATH": str(REPOSITORY)}) as served:
        yield Target(
            name=OURS, url=served.url, key=key, processes=lambda: served.replicas("gateway")
        )


@contextmanager
def bare(folder: Path) -> Iterator[Target]:
    state = state_of(folder / "bare")
    with uvicorn("--factory", "benchmarks.instant:bare", env=state) as (process, url):
        yield Target(
            name=BARE, url=url, key=a_key(state), processes=lambda: [psutil.Process(process.pid)]
        )


@contextmanager
def litellm(folder: Path) -> Iterator[Target]:
    binary = installed_litellm()
    key = f"sk-{secrets.token_hex(32)}"
    with uvicorn("--lifespan=off", "benchmarks.instant:upstream", env={}) as (_, upstream):
        config = folder / "litellm.yaml"
        route = {"model": f"openai/{MODEL}", "api_base": f"{upstream}/v1", "api_key": "none"}
        document = {
            "model_list": [{"model_name": MODEL, "litellm_params": route}],
            "general_settings": {"master_key": key},
        }
        config.write_text(yaml.safe_dump(document))
        [port] = free_ports(1)
        command = [str(binary), f"--config={config}", "--host=127.0.0.1", f"--port={port}"]
        env = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with started([*command, "--num_workers=1"], env=env, log=folder / "litellm.log") as process:
            url = f"http://127.0.0.1:{port}"
            wait_for(f"{url}/health/liveliness", process, folder / "litellm.log")
            yield Target(name=PEER, url=url, key=key, processes=lambda: family(process.pid))


def installed_litellm() -> Path:
    """Its command, in a virtual environment that is made once."""
    folder = default_cache() / f"litellm-{LITELLM}"
    whole = folder / "whole"
    if not whole.exists():
        print(f"installing LiteLLM {LITELLM} into {folder}: a few minutes, once", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input"]
        subprocess.run([*pip, f"litellm[proxy]=={LITELLM}"], check=True)
        whole.touch()
    return folder / "bin" / "litellm"


def state_of(home: Path) -> dict[str, str]:
    """An environment in which everything is kept in ``home``."""
    return {
        "FRONTIER_HOME": str(home),
        "FRONTIER_DATABASE": f"sqlite:///{home / 'frontier.db'}",
        "FRONTIER_COUNTERS": f"sqlite:///{home / 'counters.db'}",
        "FRONTIER_CACHE_STORE": f"sqlite:///{home / 'cache.db'}",
        "FRONTIER_KEY_SECRETS": secrets.token_hex(32),
    }


def a_key(state: Mapping[str, str]) -> str:
    """Of a tenant whose plan has limits that nobody reaches."""

    def admin(*words: str) -> str:
        command = [sys.executable, "-m", "deployments.admin", *words]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **state},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    admin("create", "bench", "--plan", PLAN)
    return admin("issue", "bench")


@contextmanager
def uvicorn(*words: str, env: Mapping[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """With the loop and the parser that Serve runs."""
    [port] = free_ports(1)
    command = [sys.executable, "-m", "uvicorn", *words, "--host=127.0.0.1", f"--port={port}"]
    command += ["--loop=uvloop", "--http=httptools", "--no-access-log", "--log-level=warning"]
    with (
        TemporaryDirectory() as folder,
        started(command, env=env, log=Path(folder, "log")) as process,
    ):
        wait_for(f"http://127.0.0.1:{port}/healthz", process, Path(folder, "log"))
        yield process, f"http://127.0.0.1:{port}"


@contextmanager
def started(
    command: Sequence[str], *, env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers at all."""
    give_up = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"{url} does not answer:\n{log.read_text(errors='replace')[-4000:]}")


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


# What is measured


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one target at one number of clients: medians over the rounds."""

    rate: float
    p50: float
    p99: float
    errors: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Figures:
        return cls(
            rate=statistics.median(sample.rate for sample in samples),
            p50=statistics.median(sample.p50 for sample in samples),
            p99=statistics.median(sample.p99 for sample in samples),
            errors=sum(sample.errors for sample in samples),
        )


def compare(
    wrk: Wrk, targets: Sequence[Target], *, rounds: int, seconds: float
) -> dict[tuple[str, int], Figures]:
    """In turn, so that whatever else the machine does concerns all alike."""
    samples: defaultdict[tuple[str, int], list[Sample]] = defaultdict(list)
    for target in targets:
        wrk.run(target, clients=8, seconds=3)  # warm
    for number in range(rounds):
        for clients in CLIENTS:
            for target in targets:
                sample = wrk.run(target, clients=clients, seconds=seconds)
                samples[target.name, clients].append(sample)
                print(f"round {number + 1}, {clients} clients, {target.name}: {sample}", flush=True)
    return {each: Figures.of(found) for each, found in samples.items()}


def goals(found: Mapping[tuple[str, int], Figures]) -> Iterator[tuple[object, ...]]:
    one, many, peer = found[OURS, 1], found[OURS, 32], found[PEER, 32]
    checks: list[tuple[str, float, str, bool]] = [
        ("req/s at 32 clients", many.rate, "≥ 300", many.rate >= 300),
        (
            "req/s at 32 clients, served : LiteLLM",
            many.rate / peer.rate,
            "≥ 5",
            many.rate >= 5 * peer.rate,
        ),
        ("p50 at 1 client, ms", one.p50, "≤ 5", one.p50 <= 5),
        ("p99 at 1 client, ms", one.p99, "≤ 15", one.p99 <= 15),
        (
            "p99 at 32 clients, served : LiteLLM",
            many.p99 / peer.p99,
            "≤ 0.25",
            many.p99 <= peer.p99 / 4,
        ),
    ]
    for what, measured, goal, met in checks:
        yield what, measured, goal, "yes" if met else "**no**"


def run_comparison(options: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="frontier-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        targets = [stack.enter_context(start(folder)) for start in (litellm, bare, platform)]
        targets.reverse()
        found = compare(Wrk(folder), targets, rounds=options.rounds, seconds=options.seconds)
        memory = {target.name: target.rss_mb() for target in targets}
    report = Report("gateway", "What the gateway costs, beside LiteLLM's proxy")
    report.add(
        f"A chat request of 370 characters, answered at once by the model. Medians of"
        f" {options.rounds} rounds in turn, {options.seconds:.0f} s each; `wrk` and all processes"
        " share the machine. RSS: of the process that answers, after the load (served: of the"
        " gateway replica; the model's is another)."
    )
    rows = [
        (name, clients, each.rate, each.p50, each.p99, each.errors, memory[name])
        for (name, clients), each in sorted(found.items(), key=lambda item: item[0][1])
    ]
    report.add(table(("gateway", "clients", "req/s", "p50 ms", "p99 ms", "errors", "RSS MB"), rows))
    report.add(table(("figure", "measured", "goal", "met"), goals(found)))
    report.write()


# What is kept


@dataclass(slots=True)
class Kept:
    """Memory over requests."""

    requests: list[int] = field(default_factory=list)
    mb: list[float] = field(default_factory=list)
    errors: int = 0
    seconds: float = 0.0

    def deviation(self) -> float:
        """The farthest from the middle, as a share of it."""
        middle = statistics.median(self.mb)
        return max(abs(each - middle) for each in self.mb) / middle

    def growth(self) -> float:
        """Of the last tenth over the first, as a share."""
        tenth = max(1, len(self.mb) // 10)
        return statistics.mean(self.mb[-tenth:]) / statistics.mean(self.mb[:tenth]) - 1


def watch(wrk: Wrk, target: Target, *, warm_up: int, requests: int) -> Kept:
    kept, sent = Kept(), -warm_up
    while sent < requests:
        sample = wrk.run(target, clients=32, seconds=SEGMENT_S)
        sent += sample.requests
        if sent < 0:
            continue
        kept.requests.append(sent)
        kept.mb.append(target.rss_mb())
        kept.errors += sample.errors
        kept.seconds += sample.seconds
        print(f"{sent:7} requests, {kept.mb[-1]:.1f} MB, {sample.rate:.0f} req/s", flush=True)
    return kept


def plot(kept: Kept, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    middle = statistics.median(kept.mb)
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.axhspan(middle * (1 - FLAT), middle * (1 + FLAT), alpha=0.15, label=f"± {FLAT:.0%}")
    axes.plot([each / 1000 for each in kept.requests], kept.mb, label="gateway replica")
    axes.set(xlabel="requests, thousands", ylabel="RSS, MB", ylim=(0, middle * 1.3), xlim=(0, None))
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def run_memory(options: argparse.Namespace) -> None:
    with TemporaryDirectory(prefix="frontier-bench-") as name, platform(Path(name)) as target:
        kept = watch(Wrk(Path(name)), target, warm_up=options.warm_up, requests=options.requests)
    report = Report("gateway_memory", "What a gateway replica keeps in memory")
    report.add(
        f"32 clients, every policy, every prompt a new one; {options.warm_up} requests before the"
        f" first look. {kept.requests[-1] / kept.seconds:.0f} req/s, {kept.errors} errors."
    )
    flat = kept.deviation() <= FLAT
    rows = [
        ("requests", kept.requests[-1], f"{options.requests}", ""),
        ("RSS, median MB", statistics.median(kept.mb), "", ""),
        ("RSS, lowest / highest MB", f"{min(kept.mb):.1f} / {max(kept.mb):.1f}", "", ""),
        (
            "farthest from the median",
            f"{kept.deviation():.1%}",
            f"≤ {FLAT:.0%}",
            "yes" if flat else "**no**",
        ),
        ("last tenth over the first", f"{kept.growth():+.1%}", "", ""),
    ]
    report.add(table(("figure", "measured", "goal", "met"), rows))
    picture = report.path.with_suffix(".png")
    report.add(f"![RSS over requests]({picture.name})")
    report.write()
    plot(kept, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="length of each load")
    parser.add_argument("--memory", action="store_true", help="many requests instead, and a plot")
    parser.add_argument("--requests", type=int, default=200_000, help="of --memory")
    parser.add_argument("--warm-up", type=int, default=10_000, help="requests before --memory")
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        print("not measured: wrk is not installed; on Debian: apt-get install wrk", file=sys.stderr)
        return
    (run_memory if options.memory else run_comparison)(options)


if __name__ == "__main__":
    main()
