"""The heart: `act` takes an observation to the policy's decision."""

import random
from dataclasses import dataclass
from functools import partial

from service.agent.options import Options
from service.agent.policies import Policies
from service.engine.base import (
    Engine,
    History,
    Overflow,
    Recorded,
    Slot,
    TextSink,
    Transcript,
    Wanted,
    cache_salt,
)
from service.trajectory import Decision, Message


@dataclass(frozen=True, slots=True)
class View:
    """What the agent sees of an episode, read-only. `step` is the index of the step to decide."""

    tenant: str
    policy: str
    step: int
    options: Options
    history: History


class Agent:
    """The policy behind the episodes: an engine, and the base model and adapters that it serves."""

    def __init__(self, policies: Policies, engine: Engine) -> None:
        self.policies = policies
        self.engine = engine
        self._random = random.Random()  # noqa: S311 - draws actions, not secrets

    async def act(
        self, view: View, message: Message, slot: Slot, recorded: Recorded | None = None, sink: TextSink | None = None
    ) -> Decision | Overflow:
        """The decision for the message's observation. `slot` is entered around each request to the model; `recorded` is
        an action that somebody else chose; `sink` receives the text as it is drawn.

        Changes nothing. Raises ActionSpaceRefused, EngineUnavailable.
        """
        options = view.options
        space = options.action_space.narrowed(message.legal_actions)
        transcript = Transcript(
            options.system,
            view.history,
            message.observation,
            options.max_context_tokens,
            slides=options.overflow == "slide",
        )
        wanted = Wanted(
            sampling=options.sampling,
            generator=partial(self._generator, view),
            slot=slot,
            reasoning=options.reasoning,
            recorded=recorded,
            adapter=self.policies.get(view.policy).adapter,
            cache_salt=cache_salt(view.tenant),
            sink=sink,
        )
        return await self.engine.decide(transcript, space, wanted)

    def _generator(self, view: View, purpose: str) -> random.Random:
        """With a seed each step and purpose has a generator of its own, so that a step can be reproduced."""
        seed = view.options.sampling.seed
        return self._random if seed is None else random.Random(f"{seed}:{view.step}{purpose}")  # noqa: S311
