"""Owns the dashboard: `python deploy/grafana/dashboard.py` writes dashboards/episodic.json from the panels below.

A panel here is its title, unit, queries and what it tells; ids, places and what Grafana wants besides follow. It is a
fifth of the JSON's length, and a test holds the two together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards" / "episodic.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
S = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
"""Selects the replicas that are chosen above the panels; all of them match where there is no such label."""
UP = f'up{{job="episodic", {S}}}'
"""Prometheus's own word on each replica: it is there when the replica's metrics are not."""
HEIGHT, FULL_WIDTH = 8, 24


@dataclass(frozen=True)
class Panel:
    """`queries`: PromQL and what its lines are called. `description`: what it tells, and what to do."""

    title: str
    unit: str
    description: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    top: float | None = None
    """Of the axis, where a share cannot be more."""
    below_zero: bool = False


def quantile(share: float, buckets: str, *by: str) -> str:
    return f"histogram_quantile({share}, sum by ({', '.join([*by, 'le'])}) ({buckets}))"


def per_second(metric: str, *by: str, where: str = "") -> str:
    selected = f"{where}, {S}" if where else S
    total = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{total} (rate({metric}{{{selected}}}[$__rate_interval]))"


ACT_BUCKETS = f"instance_part_le:agent_act_seconds_bucket:rate5m{{{S}}}"
WHOLE_ACT = f'instance_part_le:agent_act_seconds_bucket:rate5m{{part="total_s", {S}}}'
COMMIT_BUCKETS = f"instance_le:agent_store_commit_seconds_bucket:rate5m{{{S}}}"


def acts(outcomes: str) -> str:
    return f'sum by (outcome) (instance_outcome:agent_acts:rate5m{{outcome=~"{outcomes}", {S}}})'


def tokens(kind: str) -> str:
    return f'sum (instance_kind:agent_tokens:rate5m{{kind="{kind}", {S}}})'


def engine_quantile(share: float, metric: str) -> str:
    return quantile(share, f"rate({metric}_bucket{{{S}}}[$__rate_interval])")


def returned(sign: str) -> str:
    return f'sum by (profile) (increase(agent_returns_total{{sign="{sign}", {S}}}[15m]))'


ROWS: dict[str, list[Panel]] = {
    "Traffic": [
        Panel(
            "Ready replicas",
            "none",
            "Replicas that serve acts, that answer Prometheus, and that it finds. ready below up: agent_readiness says "
            "why. up below found: their logs do. None ready: callers get 503, or no answer.",
            (
                (f'sum (agent_readiness{{state="ready", {S}}}) or vector(0)', "ready"),
                (f"sum ({UP}) or vector(0)", "up"),
                (f"count ({UP}) or vector(0)", "found"),
            ),
            kind="stat",
            width=4,
        ),
        Panel(
            "What is served",
            "none",
            "Version and policy of each replica. Different ones are normal during a rollout and only then.",
            ((f"agent_info{{{S}}}", ""),),
            kind="table",
            width=12,
        ),
        Panel(
            "Uptime",
            "s",
            "Seconds since each process started. One that is always young ends by itself: its log says why.",
            ((f"time() - process_start_time_seconds{{{S}}}", "{{instance}}"),),
            kind="stat",
        ),
        Panel(
            "Acts",
            "reqps",
            "Answered acts a second: acted got an action, done ended its episode, replayed was a retry that got the "
            "stored answer. Many replays: answers get lost on their way, or callers give up too early.",
            ((acts("acted|done|replayed"), "{{outcome}}"),),
        ),
        Panel(
            "Acts in flight",
            "none",
            "Acts inside now; of them and of calls of /v1, those in the engine and those that wait for a place there. "
            "A queue that never empties means that the engine is full: add replicas.",
            (
                (f"sum (agent_active_acts{{{S}}})", "acts in flight"),
                (f"sum (agent_running_acts{{{S}}})", "in the engine"),
                (f"sum (agent_waiting_acts{{{S}}})", "waiting"),
            ),
        ),
        Panel(
            "HTTP requests by route",
            "reqps",
            "All calls, /v1 and the probes included. A route that grows without the others: look who calls it.",
            ((per_second("agent_http_requests_total", "route"), "{{route}}"),),
        ),
    ],
    "Latency by part": [
        Panel(
            "Act, whole",
            "s",
            "From the request to the answer, as the service sees it. If it grows, the panel beside says in which part.",
            tuple((quantile(share, WHOLE_ACT), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)),
        ),
        Panel(
            "Slowest hundredth by part",
            "s",
            "p99 of the wait for a turn (queue_s), of the engine (engine_s) and of the commit (store_s). queue_s: add "
            "replicas. engine_s: longer prompts or a missed cache. store_s: the disk or the database.",
            ((quantile(0.99, ACT_BUCKETS, "part"), "{{part}}"),),
        ),
        Panel(
            "Acts by their time",
            "s",
            "How many acts took how long. Two bands are two kinds of acts, say discrete ones and long texts.",
            (
                (
                    f'sum by (le) (increase(agent_act_seconds_bucket{{part="total_s", {S}}}[$__rate_interval]))',
                    "{{le}}",
                ),
            ),
            kind="heatmap",
        ),
    ],
    "Tokens and cache hits": [
        Panel(
            "Tokens of acts",
            "cps",
            "Tokens a second: prompt (of whole windows), cached (the part of it that was not computed again) and "
            "completion. Prompt far above completion is normal: an episode's history is in every prompt.",
            ((f"sum by (kind) (instance_kind:agent_tokens:rate5m{{{S}}})", "{{kind}}"),),
        ),
        Panel(
            "Prompt tokens from the cache",
            "percentunit",
            "The share of the prompts that the prefix cache held. It falls when episodes change replicas (route by "
            "X-Episode-Id), when the KV cache is too small, or when many episodes are new.",
            ((f"{tokens('cached')} / {tokens('prompt')}", "cached"),),
            top=1,
        ),
        Panel(
            "Tokens of one act",
            "none",
            "Mean prompt and completion. Prompts that grow make acts slower: bound them with context.max_tokens.",
            tuple(
                (f"{tokens(kind)} / sum ({acts('acted')})", kind)  # those that end an episode have none
                for kind in ("prompt", "completion")
            ),
        ),
    ],
    "Episodes and returns": [
        Panel(
            "Episodes begun and ended",
            "cps",
            "Episodes a second, the ended ones by their reason. idle_ttl: callers leave them; max_steps and "
            "context_overflow: they are cut; aborted: ended from outside.",
            (
                (per_second("agent_episodes_started_total"), "started"),
                (per_second("agent_episodes_ended_total", "stop_reason"), "{{stop_reason}}"),
            ),
        ),
        Panel(
            "Active episodes",
            "none",
            "active: not ended, in the whole store. in memory: of all replicas. Active ones that only grow are never "
            "ended: set idle_ttl_s. More than memory holds: raise EPISODIC_MAX_LIVE_EPISODES if latency suffers.",
            (
                # Every replica tells of the store that it shares with the others of its installation.
                (f"sum (max by (namespace, job) (agent_active_episodes{{{S}}}))", "active"),
                (f"sum (agent_live_episodes{{{S}}})", "in memory"),
            ),
        ),
        Panel(
            "Length of episodes",
            "none",
            "Steps of ended episodes, by profile: the middle one, and the one that only a twentieth exceed.",
            tuple(
                (
                    quantile(share, f"rate(agent_episode_steps_bucket{{{S}}}[15m])", "profile"),
                    f"{{{{profile}}}} p{share * 100:g}",
                )
                for share in (0.5, 0.95)
            ),
        ),
        Panel(
            "Mean return",
            "short",
            "Of the episodes that ended within 15 minutes, by profile. A fall after a change of policy is the policy; "
            "one without it is the environment, or episodes that are cut.",
            (
                (
                    f"({returned('positive')} - {returned('negative')})\n"
                    f"/ sum by (profile) (increase(agent_episode_return_count{{{S}}}[15m]))",
                    "{{profile}}",
                ),
            ),
            width=12,
            below_zero=True,
        ),
        Panel(
            "Episodes with a return above 0",
            "percentunit",
            "Their share, by profile: in tasks that reward success alone, the rate of success.",
            (
                (
                    f'1 - sum by (profile) (increase(agent_episode_return_bucket{{le="0.0", {S}}}[15m]))\n'
                    f"/ sum by (profile) (increase(agent_episode_return_count{{{S}}}[15m]))",
                    "{{profile}}",
                ),
            ),
            width=12,
            top=1,
        ),
    ],
    "Errors and refusals": [
        Panel(
            "Acts that failed",
            "reqps",
            "By code. engine_unavailable: the engine died or loads. store_unavailable: the database. draining: a "
            "replica that ends. deadline_exceeded: callers wait less than acts take. internal_error: a fault.",
            ((acts("engine_unavailable|store_unavailable|draining|deadline_exceeded|internal_error"), "{{outcome}}"),),
        ),
        Panel(
            "Acts that were refused for load",
            "reqps",
            "429: overloaded (the queue is full; add replicas) and quota_exceeded (one tenant has its share).",
            ((acts("overloaded|quota_exceeded"), "{{outcome}}"),),
        ),
        Panel(
            "Acts that were out of place",
            "reqps",
            "Mistakes of callers. step_conflict and episode_busy: two of them act in one episode. episode_ended and "
            "episode_not_found: they go on where nothing is. idempotency_mismatch: a retry with another body.",
            (
                (
                    acts("step_conflict|idempotency_mismatch|episode_.*|context_overflow|invalid_request"),
                    "{{outcome}}",
                ),
            ),
        ),
        Panel(
            "Answers by status",
            "reqps",
            "Of all routes but the probes and /metrics. More 401 and 403: a key was revoked, or somebody tries some. "
            "499: callers leave before their answer. 500: a fault of the service; the log has it.",
            (
                (
                    per_second("agent_http_requests_total", "status", where='route!~"/readyz|/healthz|/metrics"'),
                    "{{status}}",
                ),
            ),
        ),
        Panel(
            "Completions without an action",
            "cps",
            "By kind. length: max_tokens cut it. json and schema: the policy does not keep to what it is asked for.",
            ((per_second("agent_parse_failures_total", "kind"), "{{kind}}"),),
        ),
        Panel(
            "Engine failures",
            "none",
            "Engines that died, hung or could not be loaded, within an hour. Each is loaded again; the log says why it "
            "went, most often for memory.",
            ((f"sum by (instance) (increase(agent_engine_failures_total{{{S}}}[1h]))", "{{instance}}"),),
        ),
    ],
    "Store": [
        Panel(
            "Time of a commit",
            "s",
            "Every act waits for one. If it grows: the disk's write latency, other writers, PostgreSQL's checkpoints.",
            tuple((quantile(share, COMMIT_BUCKETS), f"p{share * 100:g}") for share in (0.5, 0.99)),
        ),
        Panel(
            "Commits",
            "cps",
            "Transactions a second. Fewer than acts is good: acts that come together share one.",
            ((per_second("agent_store_commits_total"), "commits"),),
        ),
        Panel(
            "Changes in one commit",
            "none",
            "Mean number of acts and new episodes that share a commit. It grows with load, or with a slow disk.",
            ((f"{per_second('agent_store_batch_size_sum')}\n/ {per_second('agent_store_batch_size_count')}", "mean"),),
        ),
    ],
    "Engine": [
        Panel(
            "Requests in the engine",
            "none",
            "What vLLM runs and what waits inside it, /v1 included. Waiting here while acts run: its batch or its KV "
            "cache is full; let fewer acts run (EPISODIC_MAX_RUNNING_ACTS).",
            (
                (f"sum (vllm:num_requests_running{{{S}}})", "running"),
                (f"sum (vllm:num_requests_waiting{{{S}}})", "waiting"),
            ),
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            "Near 1 requests are put aside and computed twice: give it more memory, or let fewer run.",
            ((f"max by (instance) (vllm:kv_cache_usage_perc{{{S}}})", "{{instance}}"),),
            top=1,
        ),
        Panel(
            "Requests put aside",
            "cps",
            "Preemptions a second: the KV cache ran out amid a request, which then begins anew. Should be 0.",
            ((per_second("vllm:num_preemptions_total", "instance"), "{{instance}}"),),
        ),
        Panel(
            "Tokens of the engine",
            "cps",
            "Prompt tokens read and tokens generated a second. Both 0 while acts are in flight: it hangs.",
            (
                (per_second("vllm:prompt_tokens_total"), "prompt"),
                (per_second("vllm:generation_tokens_total"), "generated"),
            ),
        ),
        Panel(
            "Time to the first token",
            "s",
            "From a request's arrival in the engine. It grows with prompts that are not cached, and with its queue.",
            tuple((engine_quantile(q, "vllm:time_to_first_token_seconds"), f"p{q * 100:g}") for q in (0.5, 0.99)),
        ),
        Panel(
            "Time between tokens",
            "s",
            "What a reader of a stream feels. It grows with the batch: fewer running acts make each of them faster.",
            tuple((engine_quantile(q, "vllm:inter_token_latency_seconds"), f"p{q * 100:g}") for q in (0.5, 0.99)),
        ),
        Panel(
            "Prefix cache hits",
            "percentunit",
            "The share of looked-up tokens that the engine had, /v1 included. As for acts: it falls when episodes "
            "change replicas or the KV cache is too small.",
            (
                (
                    f"{per_second('vllm:prefix_cache_hits_total')}\n/ {per_second('vllm:prefix_cache_queries_total')}",
                    "hits",
                ),
            ),
            width=12,
            top=1,
        ),
        Panel(
            "Requests by how they ended",
            "reqps",
            "stop: by themselves. length: cut by max_tokens. abort: the caller left or a deadline ran out. error: see "
            "the log. A discrete action is a request or more that ends with length.",
            ((per_second("vllm:request_success_total", "finished_reason"), "{{finished_reason}}"),),
            width=12,
        ),
    ],
    "Process": [
        Panel(
            "CPU",
            "percentunit",
            "Cores that the HTTP process uses; the engine has a process of its own. Near 1 it is the bound: add "
            "replicas on this machine.",
            ((f"rate(process_cpu_seconds_total{{{S}}}[$__rate_interval])", "{{instance}}"),),
            width=6,
        ),
        Panel(
            "Memory",
            "bytes",
            "Resident memory of the HTTP process. It grows with the episodes in memory and then stays; one that only "
            "grows is a leak.",
            ((f"process_resident_memory_bytes{{{S}}}", "{{instance}}"),),
            width=6,
        ),
        Panel(
            "File descriptors",
            "percentunit",
            "Open ones, of those it may open. Each connection has one. Near 1 it refuses connections: raise the limit.",
            ((f"process_open_fds{{{S}}} / process_max_fds{{{S}}}", "{{instance}}"),),
            width=6,
            top=1,
        ),
        Panel(
            "Tasks of the event loop",
            "none",
            "About a dozen, and 3 to 7 for each act in flight. If calm moments grow from hour to hour, it is a leak.",
            ((f"agent_tasks{{{S}}}", "{{instance}}"),),
            width=6,
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    return {
        "uid": "episodic",
        "title": "Episodic",
        "description": "The service, from its traffic down to its process. Made by deploy/grafana/dashboard.py.",
        "tags": ["episodic"],
        "schemaVersion": 41,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                choice("namespace", "Namespace", 'up{job="episodic"}'),
                choice("job", "Service", 'up{job="episodic", namespace=~"$namespace"}'),
                choice("instance", "Replica", 'up{job="episodic", namespace=~"$namespace", job=~"$job"}'),
            ]
        },
        "panels": panels(),
    }


def choice(name: str, label: str, series: str) -> dict[str, Any]:
    """Of the label `name`, as `series` have it; where none has it, all is the only choice, and matches."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({series}, {name})", "refId": name},
        "refresh": 2,  # whenever the time range changes: replicas come and go
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def panels() -> list[dict[str, Any]]:
    """Rows in order; the panels of each from left to right, in as many lines as they need."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row, (title, content) in enumerate(ROWS.items(), 1):
        place = {"x": 0, "y": y, "w": FULL_WIDTH, "h": 1}
        placed.append(
            {"id": row * 100, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        )
        y += 1
        x = 0
        for number, panel in enumerate(content, 1):
            if x + panel.width > FULL_WIDTH:
                x, y = 0, y + HEIGHT
            placed.append(rendered(panel, row * 100 + number, {"x": x, "y": y, "w": panel.width, "h": HEIGHT}))
            x += panel.width
        y += HEIGHT
    return placed


def rendered(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    forms = {"table": {"format": "table", "instant": True}, "heatmap": {"format": "heatmap"}, "stat": {"instant": True}}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "editorMode": "code",
            "expr": expr,
            "legendFormat": legend,
            **forms.get(panel.kind, {"range": True}),
        }
        for index, (expr, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": field(panel), "overrides": []},
        "options": OPTIONS[panel.kind],
        **({"transformations": [TABLE_COLUMNS]} if panel.kind == "table" else {}),
        "targets": targets,
    }


def field(panel: Panel) -> dict[str, Any]:
    shown: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        shown["color"] = {"mode": "palette-classic"}
        shown["custom"] = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 10, "showPoints": "never"}
        if not panel.below_zero:
            shown["min"] = 0
        if panel.top is not None:
            shown["max"] = panel.top
    return shown


OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value_and_name",
        "orientation": "auto",
        "justifyMode": "auto",
    },
    "table": {"showHeader": True, "cellHeight": "sm"},
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "exponent": 0.5, "fill": "blue"},
        "yAxis": {"unit": "s", "axisPlacement": "left"},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False},
        "legend": {"show": True},
    },
}
TABLE_COLUMNS = {
    "id": "organize",
    "options": {
        "excludeByName": {"Time": True, "Value": True, "__name__": True},
        "indexByName": {"namespace": 0, "job": 1, "instance": 2, "version": 3, "policy": 4, "policy_version": 5},
        "renameByName": {"policy_version": "policy version"},
    },
}


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
