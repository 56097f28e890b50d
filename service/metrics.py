"""Owns the service's metrics, all named `agent_*`, in Prometheus's global registry beside the engine's `vllm:*`."""

from prometheus_client import Counter, Gauge, Histogram

_LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)

ACTS = Counter("agent_acts", "Acts by outcome: acted, done, replayed, or an error's code.", ["outcome"])
ACT_SECONDS = Histogram("agent_act_seconds", "Seconds of an act by part.", ["part"], buckets=_LATENCY_S)
ENGINE_FAILURES = Counter("agent_engine_failures", "Engines that died, hung, or could not be loaded.")
EPISODES_STARTED = Counter("agent_episodes_started", "Episodes opened.")
EPISODES_ENDED = Counter("agent_episodes_ended", "Episodes ended, by stop reason.", ["stop_reason"])
LIVE_EPISODES = Gauge("agent_live_episodes", "Episodes held in memory; the others are in the store alone.")
ACTIVE_ACTS = Gauge("agent_active_acts", "Acts in flight.")
WAITING_ACTS = Gauge("agent_waiting_acts", "Admitted acts that wait for a place in the engine.")
TASKS = Gauge("agent_tasks", "Tasks of the event loop; a number that only grows is a leak.")
ACTIVE_EPISODES = Gauge("agent_active_episodes", "Episodes that have not ended, in memory or not.")
TOKENS = Counter("agent_tokens", "Tokens by kind: prompt, cached (of the prompt), completion.", ["kind"])
PARSE_FAILURES = Counter("agent_parse_failures", "Completions that gave no action, by kind.", ["kind"])
STORE_COMMITS = Counter("agent_store_commits", "Commits to the store; concurrent acts share one.")
STORE_COMMIT_SECONDS = Histogram("agent_store_commit_seconds", "Seconds of a commit.", buckets=_LATENCY_S)
STORE_BATCH_SIZE = Histogram("agent_store_batch_size", "Acts and new episodes in one commit.", buckets=_BATCH)

_PARTS = {part: ACT_SECONDS.labels(part) for part in ("queue_s", "engine_s", "store_s", "total_s")}
_TOKENS = {f"{kind}_tokens": TOKENS.labels(kind) for kind in ("prompt", "cached", "completion")}


def record_act(outcome: str, timing: dict[str, float], usage: dict[str, int]) -> None:
    """Counts an answered act; `timing` in seconds and `usage` in tokens are as in the answer."""
    ACTS.labels(outcome).inc()
    for part, seconds in timing.items():
        _PARTS[part].observe(seconds)
    for kind, num_tokens in usage.items():
        _TOKENS[kind].inc(num_tokens)


def record_commit(num_acts: int, seconds: float) -> None:
    STORE_COMMITS.inc()
    STORE_COMMIT_SECONDS.observe(seconds)
    STORE_BATCH_SIZE.observe(num_acts)
