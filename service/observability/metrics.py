"""Prometheus metrics of the service. All names start with `agent_`; the engine's metrics are named `vllm:*`.

Both are in the global registry of prometheus_client. docs/reference.md lists the service's metrics.
"""

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from service.observability.fast_metrics import FastCounter, FastGauge, FastHistogram
from service.trajectory import Step, StopReason

disable_created_metrics()  # otherwise each counter and histogram gets a second series, *_created, that nobody uses

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_RETURN = (-1000, -100, -10, -1, 0, 0.5, 1, 10, 100, 1000)
MAX_RETURN = 1e9
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

OUTCOMES = (
    *("acted", "done", "replayed", "internal_error", "engine_unavailable", "store_unavailable", "draining"),
    *("deadline_exceeded", "overloaded", "quota_exceeded", "episode_not_found", "episode_deleted", "invalid_request"),
    *("step_conflict", "idempotency_mismatch", "episode_busy", "episode_ended", "context_overflow"),
)
ACTS = FastCounter("agent_acts", "Acts by outcome: acted, done, replayed, or an error code.", ["outcome"])
ACT_SECONDS = FastHistogram(
    "agent_act_seconds",
    "Duration of an act in seconds, by part: queue_s, engine_s, store_s, total_s.",
    ["part"],
    buckets=_LATENCY_S,
)
ENGINE_FAILURES = Counter("agent_engine_failures", "Times that an engine died, hung, or could not be loaded.")
EPISODES_STARTED = Counter("agent_episodes_started", "Episodes opened.")
EPISODES_ENDED = Counter("agent_episodes_ended", "Episodes ended, by stop reason.", ["stop_reason"])
CACHED_EPISODES = Gauge("agent_live_episodes", "Episodes cached in memory; the others are only in the store.")
ACTIVE_ACTS = FastGauge("agent_active_acts", "In-flight acts, waiting ones included.").labels()
RUNNING_ACTS = FastGauge("agent_running_acts", "Requests of acts and of /v1 that occupy a slot of the engine.").labels()
WAITING_ACTS = FastGauge("agent_waiting_acts", "Requests of acts and of /v1 that wait for a slot.").labels()
TASKS = Gauge("agent_tasks", "Tasks of the event loop. If the number only grows, tasks leak.")
ACTIVE_EPISODES = Gauge("agent_active_episodes", "Episodes in the store that have not ended, cached or not.")
TOKENS = FastCounter("agent_tokens", "Tokens by kind: prompt, cached (part of the prompt), completion.", ["kind"])
PARSE_FAILURES = Counter(
    "agent_parse_failures", "Completions that gave no valid action, by kind: length, json, schema.", ["kind"]
)
UNEXPECTED_FAILURES = Counter(
    "agent_unexpected_failures", "Unexpected exceptions (bugs); callers receive the code internal_error."
)
PURGED = Counter(
    "agent_purged",
    "Ended episodes deleted by retention, and tombstones removed, by kind: episode, tombstone.",
    ["kind"],
)
SUPPRESSED_LOG_LINES = Counter(
    "agent_suppressed_log_lines", "Log lines left out because lines with the same event were too frequent."
)
STORE_COMMITS = FastCounter("agent_store_commits", "Commits to the store. Concurrent acts share one commit.").labels()
STORE_COMMIT_SECONDS = FastHistogram(
    "agent_store_commit_seconds", "Duration of a commit in seconds.", buckets=_LATENCY_S
).labels()
STORE_BATCH_SIZE = FastHistogram(
    "agent_store_batch_size", "Acts and new episodes in one commit.", buckets=_BATCH
).labels()
EPISODE_RETURN = Histogram(
    "agent_episode_return",
    "Returns of ended episodes, by profile (none: opened without a profile).",
    ["profile"],
    buckets=_RETURN,
)
EPISODE_STEPS = Histogram(
    "agent_episode_steps",
    "Steps of ended episodes, by profile (none: opened without a profile).",
    ["profile"],
    buckets=_STEPS,
)
# The mean return needs the sum of the returns. prometheus_client writes no sum for a histogram with negative buckets,
# and a counter must not decrease. Therefore positive and negative returns are summed in two counters.
RETURNS = Counter(
    "agent_returns",
    "Sum of the absolute returns of ended episodes, each at most 1e9, by profile and sign.",
    ["profile", "sign"],
)
HTTP_REQUESTS = FastCounter(
    "agent_http_requests", "HTTP requests by route (- if no route matched) and status.", ["route", "status"]
)
READINESS = Gauge("agent_readiness", "1 for the current state, 0 for the others; the states of /readyz.", ["state"])
INFO = Gauge("agent_info", "Always 1; the labels say what is served.", ["version", "policy", "policy_version"])

STATES = ("ready", "loading", "engine_unavailable", "store_unavailable", "draining")

# Create the series at 0 now: `rate` ignores the first increment of a series that did not exist before.
for _outcome in OUTCOMES:
    ACTS.labels(_outcome)
for _reason in StopReason:
    EPISODES_ENDED.labels(_reason)
for _kind in ("episode", "tombstone"):
    PURGED.labels(_kind)
for _kind in ("length", "json", "schema"):
    PARSE_FAILURES.labels(_kind)


_PARTS = {part: ACT_SECONDS.labels(part) for part in ("queue_s", "engine_s", "store_s", "total_s")}
_TOKENS = {f"{kind}_tokens": TOKENS.labels(kind) for kind in ("prompt", "cached", "completion")}


def count_act(step: Step, timing: dict[str, float]) -> None:
    """Counts an answered act. `timing` is that of the answer: seconds by part."""
    ACTS.labels("done" if step.closing else "acted").inc()
    for part, seconds in timing.items():
        _PARTS[part].observe(seconds)
    for kind, num_tokens in step.answer["usage"].items():
        _TOKENS[kind].inc(num_tokens)
    if failure := step.answer["parse_failure"]:
        PARSE_FAILURES.labels(failure["kind"]).inc()


def count_commit(num_acts: int, seconds: float) -> None:
    """Counts a commit to the store. `num_acts` includes new episodes."""
    STORE_COMMITS.inc()
    STORE_COMMIT_SECONDS.observe(seconds)
    STORE_BATCH_SIZE.observe(num_acts)


def count_end(stop_reason: StopReason, profile: str | None, episode_return: float, num_steps: int) -> None:
    """Counts an ended episode. `profile` must be a known profile's name, so that the number of series is bounded.

    A return beyond MAX_RETURN counts as MAX_RETURN: no episode may make the sum of all returns infinite, or so large
    that the returns of others are lost in rounding.
    """
    name = profile or "none"
    episode_return = min(max(episode_return, -MAX_RETURN), MAX_RETURN)
    EPISODES_ENDED.labels(stop_reason).inc()
    EPISODE_RETURN.labels(name).observe(episode_return)
    EPISODE_STEPS.labels(name).observe(num_steps)
    positive, negative = RETURNS.labels(name, "positive"), RETURNS.labels(name, "negative")
    (positive if episode_return > 0 else negative).inc(abs(episode_return))


def expect_profile(profile: str) -> None:
    """Creates the series of a profile at 0, before its first episode ends."""
    EPISODE_RETURN.labels(profile)
    EPISODE_STEPS.labels(profile)
    for sign in ("positive", "negative"):
        RETURNS.labels(profile, sign)


def count_request(route: str, status: int) -> None:
    """Counts an HTTP request. `route` is a template such as /episode/{episode_id}, not the path of the request."""
    HTTP_REQUESTS.labels(route, status).inc()


def set_state(unready_reason: str | None, version: str, policy: str | None, policy_version: str | None) -> None:
    """Sets `agent_readiness` and `agent_info` to what /readyz and /version answer.

    `unready_reason` is None if the service is ready. `policy` and `policy_version` are None while no policy is loaded.
    """
    for state in STATES:
        READINESS.labels(state).set(state == (unready_reason or "ready"))
    INFO.clear()
    INFO.labels(version, policy or "", policy_version or "").set(1)


expect_profile("none")
