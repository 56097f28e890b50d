"""Acts without HTTP and without a store: the agent decides, and the episode advances as after a commit."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from service.agent.agent import Agent
from service.engine.base import Overflow
from service.sessions.acts import ActRequest
from service.sessions.episode import Episode
from service.trajectory import Message, Step


@asynccontextmanager
async def slot() -> AsyncGenerator[None]:
    """A slot in the engine that is always free."""
    yield


async def take(agent: Agent, episode: Episode, observation: str | None = "look", **message: Any) -> Step:
    """Plays one act, and returns the step that was added to the episode."""
    request = ActRequest(Message(observation, **message), b"")
    if stop_reason := episode.ends_with(request.message):
        step = episode.closing_step(request)
    else:
        decision = await agent.act(episode.view, request.message, slot)
        assert not isinstance(decision, Overflow)
        step = episode.next_step(request, decision)
    episode.advance(step, episode.state_after(step, stop_reason))
    return step
