# What every Ray process of this platform has in its environment: sourced by scripts/serve
# on a laptop, by cluster.yaml before each `ray start`, and by a person before `ray job
# submit` or `serve run`. What is set already wins.
# shellcheck shell=dash

# Ray Serve: HAProxy in front of the replicas and no extra threads inside them: a seventh of
# the latency and several times the requests of the default. Read at import, so they must be
# there before Ray starts, on every node.
export RAY_SERVE_THROUGHPUT_OPTIMIZED="${RAY_SERVE_THROUGHPUT_OPTIMIZED:-1}"
export RAY_SERVE_ENABLE_HA_PROXY="${RAY_SERVE_ENABLE_HA_PROXY:-1}"
# Ray's HAProxy with one option more. Whoever sources this stands in the project's folder.
export RAY_SERVE_HAPROXY_BINARY_PATH="${RAY_SERVE_HAPROXY_BINARY_PATH:-$PWD/scripts/haproxy}"
# Replicas speak gRPC with each other, which would ask the `https_proxy` of a person's shell for
# this machine's own address, and wait for ever. Empty: none.
export grpc_proxy="${grpc_proxy-}"
# How long a gateway replica that is going away waits for load balancers to notice, at
# least. Ray's default of 30 s makes each stop on a laptop that long; cluster.yaml keeps it.
export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="${RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S:-1}"

# What idles is not free on a small machine: a model computes on all cores in step, so whoever
# takes a tenth of one takes a tenth of both. Ray's controller looks around ten times a second by
# itself, and every replica hands over Serve's metrics as often.
export RAY_SERVE_CONTROL_LOOP_INTERVAL_S="${RAY_SERVE_CONTROL_LOOP_INTERVAL_S:-0.5}"
export RAY_SERVE_METRICS_EXPORT_INTERVAL_MS="${RAY_SERVE_METRICS_EXPORT_INTERVAL_MS:-2000}"

# Ray runs its workers as background work (nice 15). Replicas answer people.
export RAY_worker_niceness="${RAY_worker_niceness:-0}"

# Who may submit jobs and open the dashboard: holders of ~/.ray/auth_token. Ray listens on
# every interface, on a laptop too: `disabled` lets anyone who reaches it run code.
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"

# What can be seen: fresh metrics at one fixed port a node, the Train tab of the dashboard.
export FRONTIER_METRICS_PORT="${FRONTIER_METRICS_PORT:-9464}" # OpenTelemetry's for Prometheus
export FRONTIER_DASHBOARD_PORT="${FRONTIER_DASHBOARD_PORT:-8265}" # Ray's own default
# Both or neither: Ray's agent drops a gauge that was not set for two report intervals.
export RAY_metrics_report_interval_ms="${RAY_metrics_report_interval_ms:-3000}"
export REPORTER_UPDATE_INTERVAL_MS="${REPORTER_UPDATE_INTERVAL_MS:-5000}"
export RAY_TRAIN_ENABLE_STATE_TRACKING="${RAY_TRAIN_ENABLE_STATE_TRACKING:-1}"
export RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"

# Replicas load what scripts/setup has fetched and never reach for the network themselves;
# tokenizers must not fork threads under a replica that forks.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"

# One connection, one file descriptor; the usual 1024 are few for a gateway.
ulimit -S -n 65536 2>/dev/null || ulimit -S -n "$(ulimit -H -n)"
