"""Recognizes retries: requests that repeat a committed step or the act in flight.

A retry names the same step or the same Idempotency-Key, and has the same digest. The same step or key with a different
digest is a conflict.
"""

from service.errors import Conflict
from service.sessions.acts import ActRequest, InFlightAct
from service.sessions.episode import Episode
from service.store.base import Store
from service.trajectory import Step


async def committed_step(store: Store, episode: Episode, request: ActRequest) -> Step | None:
    """Returns the committed step that the request repeats, or None. Raises Conflict (idempotency_mismatch)."""
    index, has_key = request.step, request.idempotency_key in episode.keys
    if has_key:
        index = episode.keys[request.idempotency_key or ""]
        if request.step not in (None, index):
            raise _mismatch()
    if index is None or index > episode.state.step:
        return None
    if index == episode.state.step and episode.state.status == "active":
        return None
    step = next(iter(await store.steps(episode.episode_id, index)), None)
    if step is None or (step.closing and step.digest != request.digest and not has_key):
        return None
    if step.digest != request.digest:
        raise _mismatch()
    return step


def act_in_flight(episode: Episode, request: ActRequest) -> InFlightAct | None:
    """Returns the act in flight if the request repeats it; None if no act is in flight.

    Raises Conflict (episode_busy, idempotency_mismatch) if a different act is in flight.
    """
    act = episode.in_flight
    if act is None:
        return None
    same_step = request.step is not None and request.step == episode.state.step
    same_key = request.idempotency_key is not None and request.idempotency_key == act.request.idempotency_key
    if not same_step and not same_key:
        raise busy()
    if request.digest != act.request.digest:
        raise _mismatch() if same_key or act.request.step is not None else busy()
    return act


def busy() -> Conflict:
    """Returns the error for a call that has to wait until the act in flight completes."""
    return Conflict("episode_busy", "Another act is in flight for this episode. Retry when it has completed.")


def _mismatch() -> Conflict:
    detail = "This step or Idempotency-Key was already used with a different body. A retry must send the same body."
    return Conflict("idempotency_mismatch", detail)
