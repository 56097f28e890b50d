"""The heart: act() takes an observation to a step of the policy's. It reads top to bottom as the loop itself does."""

import asyncio
import random
from array import array
from collections.abc import Coroutine, Iterable
from dataclasses import replace

from service.agent.action_spaces import DiscreteSpace, JsonSpace, RefusedSpace, RegexSpace, TextSpace
from service.agent.policies import Policies, Policy
from service.engine.base import Engine, OnText, Scores, cache_salt
from service.engine.prompt import Prompt
from service.engine.reasoning import Thought, think
from service.engine.token_log import closed_span
from service.sessions.episode import Call, Episode, Recorded
from service.trajectory import Decision, Message, Span, Step, StopReason, Usage


class Agent:
    """The policy behind the episodes: an engine, and the prompt rendering that fits its tokenizer."""

    def __init__(self, policies: Policies, engine: Engine, prompt: Prompt) -> None:
        self.policies = policies
        self.engine = engine
        self.prompt = prompt
        self._random = random.Random()  # noqa: S311 - draws actions, not secrets

    async def act(self, episode: Episode, call: Call) -> tuple[Step, StopReason | None]:
        """The step that answers `call`, not committed yet, and why the episode ends with it, if it does.

        Raises Conflict (context_overflow), EngineUnavailable.
        """
        message = call.message
        if stop_reason := message.ends or (StopReason.MAX_STEPS if episode.max_steps_reached else None):
            return episode.closing_step(call), stop_reason
        policy = self.policies.get(episode.policy)
        thinks = episode.options.reasoning is not None and call.recorded is None
        turn = self._observe(episode, message, thinks=thinks)
        start = episode.fit(len(turn), self._reserve(episode, call))
        if start is None:
            return episode.closing_step(call), episode.overflow()
        prompt = episode.log.window(start) + turn
        if call.recorded:
            decision = self._record(episode.options.action_space.write(call.recorded.action), call.recorded)
        elif thinks:
            thought = await self._think(episode, policy, prompt, call)
            decision = thought.before(await self._decide(episode, policy, call, [*prompt, *thought.span.token_ids]))
        else:
            decision = await self._decide(episode, policy, call, prompt)
        span = closed_span(turn, decision.completion, self.prompt.terminator)
        return episode.next_step(call, decision, span, len(turn), start, policy.version), None

    def _observe(self, episode: Episode, message: Message, *, thinks: bool) -> list[int]:
        if episode.log.num_steps:
            return self.prompt.next_turn(message.observation, thinks=thinks)
        return self.prompt.first_turn(episode.options.system, message.observation, thinks=thinks)

    def _reserve(self, episode: Episode, call: Call) -> int:
        """Tokens that the reply may take, its thought and its terminator included."""
        options, space = episode.options, episode.options.action_space
        if call.recorded:
            return len(self.prompt.tokenizer.encode(space.write(call.recorded.action))) + 1
        tags = self.prompt.think_tags
        thought = options.reasoning.max_tokens + len(tags.end) + len(tags.separator) if options.reasoning else 0
        if isinstance(space, DiscreteSpace):
            return thought + self.prompt.trie(call.message.legal_actions or space.actions).max_len
        return thought + options.sampling.max_tokens + 1

    async def _think(self, episode: Episode, policy: Policy, prompt: list[int], call: Call) -> Thought:
        options = episode.options
        assert options.reasoning is not None
        sampling = replace(options.sampling, max_tokens=options.reasoning.max_tokens)
        if sampling.seed is not None:
            sampling = replace(sampling, seed=self._generator(episode, "thought").getrandbits(32))
        on_text = call.listener("reasoning")
        salt = cache_salt(episode.config.tenant)
        return await think(
            self.engine, self.prompt, prompt, sampling, adapter=policy.adapter, cache_salt=salt, on_text=on_text
        )

    def _record(self, text: str, recorded: Recorded) -> Decision:
        """Somebody else's action as the policy would have written it; it drew none of its tokens."""
        ids = self.prompt.tokenizer.encode(text)
        completion = Span(array("i", ids), bytes(len(ids)), array("f", bytes(4 * len(ids))))
        return Decision(recorded.action, text, completion, None, "recorded", Usage())

    async def _decide(self, episode: Episode, policy: Policy, call: Call, prompt: list[int]) -> Decision:
        space, generator = episode.options.action_space, self._generator(episode)
        if isinstance(space, DiscreteSpace):
            return await self._choose(call.message.legal_actions or space.actions, prompt, episode, policy, generator)
        assert not isinstance(space, RefusedSpace)  # Episode.check_call lets no act so far
        return await self._write(space, prompt, episode, policy, generator, call.listener("text"))

    async def _choose(
        self, actions: tuple[str, ...], prompt: list[int], episode: Episode, policy: Policy, generator: random.Random
    ) -> Decision:
        """One forward pass for each branch of the trie; where the first token decides, that is one in all."""
        trie, salt = self.prompt.trie(actions), cache_salt(episode.config.tenant)
        passes = [
            self.engine.score([*prompt, *branch.path], branch.children, adapter=policy.adapter, cache_salt=salt)
            for branch in trie.branches
        ]
        scores = [await passes[0]] if len(passes) == 1 else await _together(passes)
        chosen = trie.draw([score.logprobs for score in scores], episode.options.sampling, generator)
        return Decision(
            action=chosen.action,
            text=chosen.action,
            completion=Span(array("i", chosen.token_ids), chosen.drawn, array("f", chosen.logprobs)),
            logprob=chosen.logprob,
            finish_reason="stop",
            usage=Usage(len(prompt), scores[0].cached_tokens if scores else 0, len(chosen.token_ids)),
            action_probs={action: chosen.probs[action] for action in actions},
        )

    async def _write(
        self,
        space: TextSpace | JsonSpace | RegexSpace,
        prompt: list[int],
        episode: Episode,
        policy: Policy,
        generator: random.Random,
        on_text: OnText | None,
    ) -> Decision:
        """Free or constrained text: the engine draws token by token."""
        sampling = episode.options.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=generator.getrandbits(32))
        salt = cache_salt(episode.config.tenant)
        completion = await self.engine.generate(
            prompt, sampling, space.constraint, adapter=policy.adapter, cache_salt=salt, on_text=on_text
        )
        action, failure = space.parse(completion.text, completion.finish_reason)
        num_drawn = len(completion.token_ids)
        return Decision(
            action=action,
            text=completion.text,
            completion=Span(array("i", completion.token_ids), b"\x01" * num_drawn, array("f", completion.logprobs)),
            logprob=sum(completion.logprobs),
            finish_reason=completion.finish_reason,
            usage=Usage(len(prompt), completion.cached_tokens, num_drawn),
            parse_failure=failure,
        )

    def _generator(self, episode: Episode, purpose: str = "") -> random.Random:
        seed = episode.options.sampling.seed
        return self._random if seed is None else random.Random(f"{seed}:{episode.head.step}{purpose}")  # noqa: S311


async def _together(calls: Iterable[Coroutine[None, None, Scores]]) -> list[Scores]:
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except ExceptionGroup as failures:  # several passes of one decision fail for one reason
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]
