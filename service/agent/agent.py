"""Asks the engine for the policy's decision on an observation."""

import random
from functools import partial

from service.agent.loaded_adapters import Policy
from service.agent.options import Options
from service.agent.policies import Policies
from service.agent.policy_names import PolicyUnknown
from service.engine.base import (
    Engine,
    EngineUnavailable,
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
from service.values import immutable


@immutable
class View:
    """A read-only view of an episode for the agent.

    policy, pin: the policy as the caller named it, and the version that acts; see `EpisodeConfig.policy_pin`.
    step: the index of the step to decide.
    """

    tenant: str
    policy: str
    pin: str | None
    step: int
    options: Options
    history: History


class Agent:
    """Decides the acts of all episodes, with one engine and the policies (base model and adapters) that it serves."""

    def __init__(self, policies: Policies, engine: Engine) -> None:
        self.policies = policies
        self.engine = engine
        self._random = random.Random()  # noqa: S311 - draws actions, not secrets

    async def act(
        self, view: View, message: Message, slot: Slot, recorded: Recorded | None = None, sink: TextSink | None = None
    ) -> Decision | Overflow:
        """Returns the policy's decision on the message's observation, or Overflow if the context is too small for it.

        slot: returns a context manager to use around each request to the model; it waits for a slot of the engine.
        recorded: an action that the caller chose; the policy then draws nothing.
        sink: receives streamed text.

        Does not change the episode. Raises ActionSpaceRefused, EngineUnavailable.
        """
        if reason := self.engine.info.no_episodes:
            raise EngineUnavailable(f"the model serves no episodes: {reason}")
        options = view.options
        policy = self.policies.ready(view.policy, view.pin) or await self._policy(view)
        space = options.action_space.narrowed(message.legal_actions)
        transcript = Transcript(
            options.system,
            view.history,
            message.observation,
            options.max_context_tokens,
            slides=options.overflow == "slide",
            template=options.context_template,
        )
        wanted = Wanted(
            sampling=options.sampling,
            generator=partial(self._generator, view),
            slot=slot,
            reasoning=options.reasoning,
            recorded=recorded,
            adapter=policy.adapter,
            cache_salt=cache_salt(view.tenant),
            sink=sink,
        )
        return await self.engine.decide(transcript, space, wanted)

    async def _policy(self, view: View) -> Policy:
        """Returns the policy of an episode, and loads it. Raises EngineUnavailable."""
        try:
            return await self.policies.get(view.policy, view.pin)
        except PolicyUnknown as error:
            raise EngineUnavailable(f"the policy of the episode is not served: {error}") from error

    def _generator(self, view: View, purpose: str) -> random.Random:
        """Returns the generator. With a seed, it depends only on seed, step and purpose, so steps are reproducible."""
        seed = view.options.sampling.seed
        return self._random if seed is None else random.Random(f"{seed}:{view.step}{purpose}")  # noqa: S311
