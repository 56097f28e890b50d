"""Owns the service's metrics, all named `agent_*`, in Prometheus's global registry beside the engine's `vllm:*`."""

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from service.trajectory import Step, StopReason

disable_created_metrics()  # a second series for each counter and histogram, which nobody asks for

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_RETURN = (-1000, -100, -10, -1, 0, 0.5, 1, 10, 100, 1000)
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

ACTS = Counter("agent_acts", "Acts by outcome: acted, done, replayed, or an error's code.", ["outcome"])
ACT_SECONDS = Histogram("agent_act_seconds", "Seconds of an act by part.", ["part"], buckets=_LATENCY_S)
ENGINE_FAILURES = Counter("agent_engine_failures", "Engines that died, hung, or could not be loaded.")
EPISODES_STARTED = Counter("agent_episodes_started", "Episodes opened.")
EPISODES_ENDED = Counter("agent_episodes_ended", "Episodes ended, by stop reason.", ["stop_reason"])
CACHED_EPISODES = Gauge("agent_live_episodes", "Episodes held in memory; the others are in the store alone.")
ACTIVE_ACTS = Gauge("agent_active_acts", "Acts in flight.")
RUNNING_ACTS = Gauge("agent_running_acts", "Acts, and calls of /v1, that have a place in the engine.")
WAITING_ACTS = Gauge("agent_waiting_acts", "Admitted ones that wait for such a place.")
TASKS = Gauge("agent_tasks", "Tasks of the event loop; a number that only grows is a leak.")
ACTIVE_EPISODES = Gauge("agent_active_episodes", "Episodes that have not ended, in memory or not.")
TOKENS = Counter("agent_tokens", "Tokens by kind: prompt, cached (of the prompt), completion.", ["kind"])
PARSE_FAILURES = Counter("agent_parse_failures", "Completions that gave no action, by kind.", ["kind"])
UNEXPECTED_FAILURES = Counter(
    "agent_unexpected_failures", "Faults of the service: what callers meet as internal_error."
)
STORE_COMMITS = Counter("agent_store_commits", "Commits to the store; concurrent acts share one.")
STORE_COMMIT_SECONDS = Histogram("agent_store_commit_seconds", "Seconds of a commit.", buckets=_LATENCY_S)
STORE_BATCH_SIZE = Histogram("agent_store_batch_size", "Acts and new episodes in one commit.", buckets=_BATCH)
EPISODE_RETURN = Histogram("agent_episode_return", "Returns of ended episodes.", ["profile"], buckets=_RETURN)
EPISODE_STEPS = Histogram("agent_episode_steps", "Steps of ended episodes.", ["profile"], buckets=_STEPS)
# A histogram of what may be negative has no sum, and a counter does not fall: so the mean return is told by two.
RETURNS = Counter("agent_returns", "Absolute returns of ended episodes, summed by sign.", ["profile", "sign"])
HTTP_REQUESTS = Counter("agent_http_requests", "HTTP requests by route (- if none was reached).", ["route", "status"])
READINESS = Gauge("agent_readiness", "1 for the state that holds: ready, or why not as in /readyz.", ["state"])
INFO = Gauge("agent_info", "1; its labels say what is served.", ["version", "policy", "policy_version"])

OUTCOMES = (
    *("acted", "done", "replayed", "internal_error", "engine_unavailable", "store_unavailable", "draining"),
    *("deadline_exceeded", "overloaded", "quota_exceeded", "episode_not_found", "episode_deleted", "invalid_request"),
    *("step_conflict", "idempotency_mismatch", "episode_busy", "episode_ended", "context_overflow"),
)
STATES = ("ready", "loading", "engine_unavailable", "store_unavailable", "draining")

# What has not happened yet is 0, not missing: the first of a counter that was not there before is lost to `rate`.
for _outcome in OUTCOMES:
    ACTS.labels(_outcome)
for _reason in StopReason:
    EPISODES_ENDED.labels(_reason)
for _kind in ("length", "json", "schema"):
    PARSE_FAILURES.labels(_kind)

_REQUESTS: dict[tuple[str, int], Counter] = {}
_PARTS = {part: ACT_SECONDS.labels(part) for part in ("queue_s", "engine_s", "store_s", "total_s")}
_TOKENS = {f"{kind}_tokens": TOKENS.labels(kind) for kind in ("prompt", "cached", "completion")}


def count_act(step: Step, timing: dict[str, float]) -> None:
    """Counts an answered act; `timing` in seconds is as in the answer."""
    ACTS.labels("done" if step.closing else "acted").inc()
    for part, seconds in timing.items():
        _PARTS[part].observe(seconds)
    for kind, num_tokens in step.answer["usage"].items():
        _TOKENS[kind].inc(num_tokens)
    if failure := step.answer["parse_failure"]:
        PARSE_FAILURES.labels(failure["kind"]).inc()


def count_commit(num_acts: int, seconds: float) -> None:
    STORE_COMMITS.inc()
    STORE_COMMIT_SECONDS.observe(seconds)
    STORE_BATCH_SIZE.observe(num_acts)


def count_end(stop_reason: StopReason, profile: str | None, episode_return: float, num_steps: int) -> None:
    """Counts an ended episode; `profile` is a profile's name, never a caller's own text."""
    named = profile or "none"
    EPISODES_ENDED.labels(stop_reason).inc()
    EPISODE_RETURN.labels(named).observe(episode_return)
    EPISODE_STEPS.labels(named).observe(num_steps)
    positive, negative = RETURNS.labels(named, "positive"), RETURNS.labels(named, "negative")
    (positive if episode_return > 0 else negative).inc(abs(episode_return))


def expect_profile(profile: str) -> None:
    """Its episodes are counted from 0 on, before the first one has ended."""
    EPISODE_RETURN.labels(profile)
    EPISODE_STEPS.labels(profile)
    for sign in ("positive", "negative"):
        RETURNS.labels(profile, sign)


def count_request(route: str, status: int) -> None:
    """Counts an HTTP request; `route` is a template such as /episode/{episode_id}, never the path as it was sent."""
    counter = _REQUESTS.get((route, status))
    if counter is None:  # looked up once: `labels` costs four times what `inc` does
        counter = _REQUESTS[route, status] = HTTP_REQUESTS.labels(route, str(status))
    counter.inc()


def set_state(unready_reason: str | None, version: str, policy: str | None, policy_version: str | None) -> None:
    """What /readyz and /version say; None while there is no policy."""
    for state in STATES:
        READINESS.labels(state).set(state == (unready_reason or "ready"))
    INFO.clear()
    INFO.labels(version, policy or "", policy_version or "").set(1)


expect_profile("none")
