"""Recognizes retries: requests that repeat a committed step or the act in flight.

A retry names the same step or the same Idempotency-Key, and has the same digest. The same step or key with a different
digest is a conflict.
"""

from collections.abc import Mapping, Sequence

from service.errors import Conflict
from service.sessions.acts import ActRequest, InFlightAct
from service.sessions.episode import Episode, keys_of
from service.sessions.episode_cache import EpisodeCache
from service.store.base import Store
from service.trajectory import EpisodeState, Step


async def committed_step(store: Store, episode: Episode, request: ActRequest) -> Step | None:
    """Returns the committed step that the request repeats, or None. Raises Conflict (idempotency_mismatch)."""
    act = episode.in_flight
    if act and _has_key_of(act, request) and request.step not in (None, episode.state.step):
        raise _mismatch()
    index = _committed_index(request, episode.keys, episode.state)
    return None if index is None else _repeated(await store.steps(episode.episode_id, index), request)


async def stored_step(cache: EpisodeCache, episode_id: str, request: ActRequest) -> Step | None:
    """Does the same as `committed_step` for an episode that cannot be loaded, because there is no engine yet.

    Raises Conflict (idempotency_mismatch), NotFound, Gone, StoreUnavailable.
    """
    stored, steps = await cache.trajectory(episode_id)
    index = _committed_index(request, keys_of(episode_id, steps), stored.state)
    return None if index is None else _repeated(steps[index : index + 1], request)


def _committed_index(request: ActRequest, keys: Mapping[str, int], state: EpisodeState) -> int | None:
    """Returns the index of the committed step that the request names, if there may be one."""
    index, key = request.step, request.idempotency_key
    if key is not None and key in keys:
        index = keys[key]
        if request.step not in (None, index):
            raise _mismatch()
    if index is None or index > state.step or (index == state.step and state.status == "active"):
        return None
    return index


def _repeated(steps: Sequence[Step], request: ActRequest) -> Step | None:
    """Returns the step, given as a sequence of at most one, if the request repeats it."""
    step = next(iter(steps), None)
    if step is None or step.digest == request.digest:
        return step
    has_key = request.idempotency_key is not None and request.idempotency_key == step.idempotency_key
    if step.closing and not has_key:
        return None  # the request is not a retry, but comes after the end of the episode
    raise _mismatch()


def act_in_flight(episode: Episode, request: ActRequest) -> InFlightAct | None:
    """Returns the act in flight if the request repeats it; None if no act is in flight.

    Raises Conflict (episode_busy, idempotency_mismatch) if a different act is in flight.
    """
    act = episode.in_flight
    if act is None:
        return None
    same_step = request.step is not None and request.step == episode.state.step
    same_key = _has_key_of(act, request)
    if not same_step and not same_key:
        raise busy()
    if request.digest != act.request.digest:
        raise _mismatch() if same_key or act.request.step is not None else busy()
    return act


def _has_key_of(act: InFlightAct, request: ActRequest) -> bool:
    return request.idempotency_key is not None and request.idempotency_key == act.request.idempotency_key


def busy() -> Conflict:
    """Returns the error for a call that has to wait until the act in flight completes."""
    return Conflict("episode_busy", "Another act is in flight for this episode. Retry when it has completed.")


def _mismatch() -> Conflict:
    detail = "This step or Idempotency-Key was already used with another step or body. A retry must send the same ones."
    return Conflict("idempotency_mismatch", detail)
