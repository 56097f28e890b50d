"""The calls of the HTTP API: how to build each request and how to parse its response. No I/O happens here."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, Literal, SupportsFloat, TypedDict, TypeVar, cast
from urllib.parse import quote, urlencode

import httpx
from uuid_utils import uuid7

from service.client.errors import ApiError, ConnectionFailed, problem, problem_of, reading
from service.client.evaluation import Evaluation
from service.client.models import (
    Act,
    EpisodePage,
    EpisodeResource,
    Feedback,
    Policy,
    PolicyVersion,
    Profile,
    TrajectoryFormat,
)
from service.client.retries import Outcome
from service.filters import EpisodeFilter, EpisodeQuery, EvaluationQuery, as_text

T = TypeVar("T")
JsonObject = Mapping[str, Any]
Observation = str | SupportsFloat | JsonObject | Sequence[Any]
"""A text, or any other JSON value but null. NumPy arrays and numbers are converted."""


class Omitted(Enum):
    """The type of OMITTED, the default of a parameter for which None has a meaning of its own: null."""

    OMITTED = "OMITTED"

    def __repr__(self) -> str:
        return self.value


OMITTED: Final = Omitted.OMITTED

_EPISODE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ACT_MARGIN_S = 5.0
"""Seconds that the client waits beyond an act's own deadline, so that it receives the service's response."""


class EpisodeFields(TypedDict, total=False):
    """The fields of POST /episode.

    A field that is left out has the profile's value, or else the service's default. A field that is None is sent as
    null, which removes the profile's value.
    """

    instructions: str
    goal: str | None
    profile: str | None
    action_space: JsonObject
    sampling: JsonObject | None
    reasoning: JsonObject | None
    context: JsonObject | None
    policy: str | None
    policy_updates: Literal["pinned", "follow"]
    max_steps: int | None
    idle_ttl_s: float | None
    tags: Sequence[str]
    metadata: JsonObject
    group: str | None


class EndFields(TypedDict, total=False):
    """How an episode ended. `reward` is for the last action. `info` is stored, but the policy does not see it."""

    reward: SupportsFloat | None
    terminated: bool
    truncated: bool
    success: bool | None
    info: JsonObject | None


class ActFields(EndFields, total=False):
    """Further fields of an act. `legal_actions` restricts a discrete action space. `timeout_s` is the deadline."""

    legal_actions: Sequence[str] | None
    timeout_s: float | None


class Filters(EpisodeQuery, total=False):
    """Which episodes to list and in which order, at most how many, and the cursor of the page."""

    limit: int
    cursor: str


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request. `read` parses a successful response."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    episode_id: str | None = None
    body: bytes | None = None
    timeout_s: float | None = None
    accept: str | None = None
    accepted_status: int | None = None
    """An error status (400 or above) that counts as a success."""
    idempotency_key: str | None = None
    repeatable: bool = True
    """Whether the request is idempotent, so that it can be retried after its response was lost."""
    content_type: str = "application/json"

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """Builds the request. It is built only once, so that every attempt sends the same bytes."""
        headers: dict[str, str] = {}
        if self.episode_id is not None:
            headers["X-Episode-Id"] = self.episode_id
        if self.accept is not None:
            headers["Accept"] = self.accept
        if self.body is not None:
            headers["Content-Type"] = self.content_type
        if self.idempotency_key is not None:
            headers["Idempotency-Key"] = self.idempotency_key
        timeout = httpx.USE_CLIENT_DEFAULT if self.timeout_s is None else self.timeout_s
        return http.build_request(self.method, self.path, content=self.body, headers=headers, timeout=timeout)

    def settle(self, outcome: Outcome) -> T:
        """The result of the call, from the outcome of its last attempt. Raises EpisodicError."""
        if isinstance(outcome, httpx.RequestError):
            raise ConnectionFailed(_sentence(outcome)) from outcome
        if not outcome.is_success and outcome.status_code != self.accepted_status:
            raise problem(outcome)
        with reading(str(self)):
            return self.read(outcome)


def act_fields(
    *,
    reward: SupportsFloat | None,
    terminated: bool,
    truncated: bool,
    success: bool | None,
    info: JsonObject | None,
    legal_actions: Sequence[str] | None = None,
    timeout_s: float | None = None,
) -> ActFields:
    """The fields that were given. A flag that is false is left out."""
    fields = {
        "reward": reward,
        "terminated": terminated or None,
        "truncated": truncated or None,
        "success": success,
        "info": info,
        "legal_actions": legal_actions,
        "timeout_s": timeout_s,
    }
    return cast("ActFields", _given(fields))


def episode_fields(**fields: Any) -> EpisodeFields:
    """The fields that are not OMITTED."""
    return cast("EpisodeFields", {name: value for name, value in fields.items() if value is not OMITTED})


def create_episode(episode_id: str, fields: EpisodeFields) -> Call[EpisodeResource]:
    check_episode_id(episode_id)
    body = _ENCODER.encode({"episode_id": episode_id, **fields}).encode()
    return Call("POST", "/episode", _episode, episode_id, body)


def get_episode(episode_id: str) -> Call[EpisodeResource]:
    return Call("GET", _path(episode_id), _episode, episode_id)


def list_episodes(filters: Filters) -> Call[EpisodePage]:
    return Call("GET", f"/episode{_query(filters)}", _page)


def stream_act(episode_id: str, step: int, observation: Observation | None, fields: ActFields) -> Call[Act]:
    return replace(act(episode_id, step, observation, fields), accept="text/event-stream")


def batch(acts: Sequence[tuple[str, int, Observation | None, ActFields]]) -> Call[list[Act | ApiError]]:
    items = [_given({"episode_id": name, "step": step, "observation": o, **f}) for name, step, o, f in acts]
    deadlines_s = [fields.get("timeout_s") for _, _, _, fields in acts]
    named_s = [deadline_s for deadline_s in deadlines_s if deadline_s is not None]
    timeout_s = max(named_s) + _ACT_MARGIN_S if named_s and len(named_s) == len(acts) else None
    return Call("POST", "/act/batch", partial(_results, len(acts)), body=encode({"acts": items}), timeout_s=timeout_s)


def record(episode_id: str, step: int, observation: Observation, action: Any, fields: ActFields) -> Call[Act]:
    body = _ENCODER.encode({**_given(fields), "step": step, "observation": observation, "action": action}).encode()
    return Call("POST", f"{_path(episode_id)}/action", _act, episode_id, body)


def fork(
    episode_id: str, episode_ids: Sequence[str], at_step: int | None, group: str | None
) -> Call[tuple[EpisodeResource, ...]]:
    fields = {"at_step": at_step, "n": len(episode_ids), "episode_ids": episode_ids, "group": group}
    return Call("POST", f"{_path(episode_id)}/fork", _episodes, episode_id, encode(fields))


def feedback(episode_id: str, fields: JsonObject) -> Call[Feedback]:
    key = str(uuid7())  # the same for all attempts: a retry adds no second rating
    return Call("POST", f"{_path(episode_id)}/feedback", _feedback, episode_id, encode(fields), idempotency_key=key)


def profiles() -> Call[list[Profile]]:
    return Call("GET", "/profile", _profiles)


def policies() -> Call[list[Policy]]:
    return Call("GET", "/policy", _policies)


def policy_versions() -> Call[list[PolicyVersion]]:
    return Call("GET", "/policy", _versions)


def load_policy(name: str, fields: JsonObject) -> Call[PolicyVersion]:
    return Call("PUT", _policy_path(name), _version, body=encode(fields))


def upload_policy(name: str, folder: Path, fields: JsonObject) -> Call[PolicyVersion]:
    path = f"{_policy_path(name)}{_query(fields)}"
    return Call("PUT", path, _version, body=_archive(folder), content_type="application/x-tar")


def _archive(folder: Path) -> bytes:
    """The two files of an adapter as a tar archive. Raises OSError."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            tar.add(folder / file, file)
    return buffer.getvalue()


def roll_back_policy(name: str) -> Call[PolicyVersion]:
    return Call("POST", f"{_policy_path(name)}/rollback", _version, repeatable=False)


def set_default_policy(policy: str | None) -> Call[str]:
    return Call("PUT", "/policy-default", _default_policy, body=_ENCODER.encode({"policy": policy}).encode())


def remove_policy(name: str) -> Call[None]:
    return Call("DELETE", _policy_path(name), _nothing, repeatable=False)


def export(format: TrajectoryFormat, where: EpisodeFilter) -> Call[None]:
    return Call("GET", f"/export{_query({'format': format, **where})}", _nothing, accept="application/x-ndjson")


def evaluation(query: EvaluationQuery) -> Call[Evaluation]:
    return Call("GET", f"/evaluation{_query(query)}", _evaluation)


def evaluation_as_markdown(query: EvaluationQuery) -> Call[str]:
    return Call("GET", f"/evaluation{_query(query)}", _as_text, accept="text/markdown")


def act(episode_id: str, step: int, observation: Observation | None, fields: ActFields) -> Call[Act]:
    body = encode({"episode_id": episode_id, "step": step, "observation": observation, **fields})
    deadline_s = fields.get("timeout_s")
    return Call("POST", "/act", _act, episode_id, body, None if deadline_s is None else deadline_s + _ACT_MARGIN_S)


def end_episode(episode_id: str, fields: EndFields) -> Call[EpisodeResource]:
    return Call("POST", f"{_path(episode_id)}/end", _episode, episode_id, encode(fields))


def trajectory(episode_id: str, format: TrajectoryFormat, from_step: int | None, limit: int | None) -> Call[Any]:
    query = _query({"format": format, "from_step": from_step, "limit": limit})
    return Call("GET", f"{_path(episode_id)}/trajectory{query}", httpx.Response.json, episode_id)


def delete_episode(episode_id: str) -> Call[None]:
    # The status is 410 if an earlier attempt, whose response was lost, deleted the episode.
    return Call("DELETE", _path(episode_id), _nothing, episode_id, accepted_status=410)


def ready(timeout_s: float) -> Call[None]:
    return Call("GET", "/readyz", _nothing, timeout_s=timeout_s)


def version() -> Call[dict[str, Any]]:
    return Call("GET", "/version", httpx.Response.json)


def check_episode_id(episode_id: str) -> None:
    if not _EPISODE_ID.fullmatch(episode_id):
        raise ValueError(f"invalid episode id {episode_id!r}: use 1 to 128 of the characters A-Z, a-z, 0-9, _ and -")


def encode(fields: JsonObject) -> bytes:
    """The fields as JSON, except those that are None. Raises ValueError for NaN and infinity, which JSON lacks."""
    return _ENCODER.encode(_given(fields)).encode()


def _given(fields: JsonObject) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _query(fields: JsonObject) -> str:
    given = _given(fields)
    metadata: JsonObject = given.pop("metadata", {})
    given |= {f"metadata.{key}": value for key, value in metadata.items()}
    return f"?{urlencode({name: _text(value) for name, value in given.items()})}" if given else ""


def _text(value: Any) -> str:
    """A value of the query: a time in ISO 8601, a text itself, anything else as JSON."""
    return value.isoformat() if isinstance(value, datetime) else as_text(value) or str(value)


def _plain(value: Any) -> Any:
    """Converts arrays and scalars of NumPy and similar libraries to plain Python values."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, SupportsFloat):
        return float(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value")


_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _default_policy(response: httpx.Response) -> str:
    return response.json()["default"]


def _policy_path(name: str) -> str:
    return f"/policy/{quote(name, safe='')}"


def _path(episode_id: str) -> str:
    check_episode_id(episode_id)
    return f"/episode/{episode_id}"


def _act(response: httpx.Response) -> Act:
    return Act.model_validate_json(response.content)


def _episode(response: httpx.Response) -> EpisodeResource:
    return EpisodeResource.model_validate_json(response.content)


def _episodes(response: httpx.Response) -> tuple[EpisodeResource, ...]:
    return EpisodePage.model_validate_json(response.content).episodes


def _feedback(response: httpx.Response) -> Feedback:
    return Feedback.model_validate_json(response.content)


def _profiles(response: httpx.Response) -> list[Profile]:
    return [Profile.model_validate(item) for item in response.json()["profiles"]]


def _policies(response: httpx.Response) -> list[Policy]:
    return [Policy.model_validate(item) for item in response.json()["policies"]]


def _versions(response: httpx.Response) -> list[PolicyVersion]:
    return [PolicyVersion.model_validate(item) for item in response.json()["versions"]]


def _version(response: httpx.Response) -> PolicyVersion:
    return PolicyVersion.model_validate_json(response.content)


def _results(num_acts: int, response: httpx.Response) -> list[Act | ApiError]:
    items: list[dict[str, Any]] = response.json()["results"]
    if len(items) != num_acts:
        raise ValueError(f"expected {num_acts} results, got {len(items)}")
    return [problem_of(item["status"], item, None) if "code" in item else Act.model_validate(item) for item in items]


def _page(response: httpx.Response) -> EpisodePage:
    return EpisodePage.model_validate_json(response.content)


def _evaluation(response: httpx.Response) -> Evaluation:
    return Evaluation.model_validate_json(response.content)


def _as_text(response: httpx.Response) -> str:
    return response.text


def _nothing(response: httpx.Response) -> None:
    del response


def _sentence(error: httpx.RequestError) -> str:
    url, why = error.request.url, str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        place = f"{url.scheme}://{url.netloc.decode()}"
        return f"cannot connect to {place} ({why}): check the URL, and whether the service runs"
    return f"{error.request.method} {url}: {why}"
