"""Tests of the agent: the requests that it makes to the engine, the seeds, and the recorded steps."""

from collections.abc import Sequence
from typing import Any

import pytest

from service.agent.action_spaces import JsonSpace, RegexSpace
from service.agent.agent import Agent
from service.agent.options import Options
from service.agent.policies import Policies
from service.engine.base import Constraint, EngineUnavailable
from service.engine.completion import Completion, Scores
from service.engine.tokenizer import HFTokenizer
from service.sessions.episode import Episode
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import EpisodeConfig, EpisodeState, Sampling, StopReason, StoredEpisode
from tests.support.acts import take


class RecordingEngine(ScriptedEngine):
    """Records the arguments of its calls."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.candidates: list[tuple[int, ...]] = []
        self.requests: list[tuple[Sampling, Constraint | None]] = []

    async def generate(
        self, prompt_token_ids: list[int], sampling: Sampling, constraint: Constraint | None, **options: Any
    ) -> Completion:
        self.requests.append((sampling, constraint))
        return await super().generate(prompt_token_ids, sampling, constraint, **options)

    async def score(self, prompt_token_ids: list[int], candidates: Sequence[int], **options: Any) -> Scores:
        self.candidates.append(tuple(candidates))
        return await super().score(prompt_token_ids, candidates, **options)


@pytest.fixture
def engine(tokenizer: HFTokenizer) -> RecordingEngine:
    return RecordingEngine(tokenizer)


@pytest.fixture
def agent(engine: RecordingEngine) -> Agent:
    return Agent(Policies(engine, MemoryStore()), engine)


def episode(agent: Agent, **request: Any) -> Episode:
    config = EpisodeConfig("e", {"policy": "scripted", **request}, b"", "v", 0.0)
    return Episode(StoredEpisode(config), Options.of(request, agent.engine.info), agent.engine.history())


def discrete(*actions: str) -> dict[str, Any]:
    return {"action_space": {"type": "discrete", "actions": list(actions)}}


async def test_one_pass_where_the_first_token_decides(agent: Agent, engine: RecordingEngine):
    playing = episode(agent, **discrete("left", "right", "up", "down"))
    step = await take(agent, playing)
    assert engine.num_calls == 1
    assert len(engine.candidates[0]) == 4
    assert engine.prompts[0] == step.span.token_ids.tolist()[: len(engine.prompts[0])]
    assert step.answer["usage"]["prompt_tokens"] == len(engine.prompts[0])


async def test_one_pass_for_each_branch_with_the_tokens_that_lead_there(agent: Agent, engine: RecordingEngine):
    actions = ("go to the door", "go to the window", "wait")
    await take(agent, episode(agent, **discrete(*actions)))
    trie = engine.trie(actions)
    assert len(trie.branches) == engine.num_calls == 2
    turn = engine.prompts[[branch.path for branch in trie.branches].index(())]
    assert [tuple(prompt[len(turn) :]) for prompt in engine.prompts] == [branch.path for branch in trie.branches]
    assert engine.candidates == [branch.children for branch in trie.branches]


async def test_each_prompt_goes_on_from_the_last_span(agent: Agent, engine: RecordingEngine):
    playing = episode(agent, instructions="Play.", **discrete("left", "right"))
    seen: list[int] = []
    for number in range(5):
        step = await take(agent, playing, f"observation {number}")
        assert engine.prompts[-1][: len(seen)] == seen
        seen += step.span.token_ids
        assert len(step.span.loss_mask) == len(step.span.logprobs) == len(step.span.token_ids)
    assert playing.history.window(1) == seen
    assert playing.state.num_tokens == len(seen)


async def test_a_step_draws_by_the_seed_and_its_index(agent: Agent):
    fields = {**discrete(*map(str, range(20))), "sampling": {"temperature": 1.0, "seed": 5}}
    one, two = episode(agent, **fields), episode(agent, **fields)
    actions = [[(await take(agent, each, "same")).answer["action"] for _ in range(10)] for each in (one, two)]
    assert actions[0] == actions[1]
    assert len(set(actions[0])) > 1
    unseeded = {**fields, "sampling": {"temperature": 1.0}}
    drawn = {tuple([(await take(agent, episode(agent, **unseeded))).answer["action"]]) for _ in range(40)}
    assert len(drawn) > 1


async def test_each_text_step_gets_a_seed_of_its_own(agent: Agent, engine: RecordingEngine):
    for _ in range(2):
        playing = episode(agent, sampling={"seed": 5})
        for _ in range(3):
            await take(agent, playing)
    seeds = [sampling.seed for sampling, _ in engine.requests]
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds[:3])) == 3
    await take(agent, episode(agent))
    assert engine.requests[-1][0].seed is None


async def test_the_engine_holds_the_reply_to_the_constraint(agent: Agent, engine: RecordingEngine):
    await take(agent, episode(agent, action_space={"type": "regex", "pattern": "[ab]+"}))
    await take(agent, episode(agent, action_space={"type": "json", "schema": {"type": "null"}}))
    await take(agent, episode(agent))
    assert [constraint for _, constraint in engine.requests] == [
        RegexSpace.of({"pattern": "[ab]+"}).constraint,
        JsonSpace.of({"schema": {"type": "null"}}).constraint,
        None,
    ]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"terminated": True}, StopReason.TERMINATED),
        ({"truncated": True}, StopReason.TRUNCATED),
        ({"terminated": True, "truncated": True}, StopReason.TERMINATED),
    ],
)
async def test_a_message_that_ends_the_episode_asks_for_nothing(
    agent: Agent, engine: RecordingEngine, message: dict[str, bool], reason: StopReason
):
    playing = episode(agent)
    await take(agent, playing)
    step = await take(agent, playing, None, reward=2.0, success=False, **message)
    assert (step.closing, step.answer["done"], len(step.span.token_ids)) == (True, True, 0)
    assert engine.num_calls == 1
    state = playing.state
    assert (state.status, state.stop_reason, state.success, state.step) == ("ended", reason, False, 1)
    assert state.episode_return == 2.0
    assert state.ended_at == state.updated_at


async def test_prompt_and_reply_fit_into_the_context(agent: Agent, engine: RecordingEngine):
    limit = 90
    playing = episode(agent, context={"max_tokens": limit}, sampling={"max_tokens": 10})
    for number in range(40):
        await take(agent, playing, "word " * (number % 7))
    assert max(map(len, engine.prompts)) + 10 + 1 <= limit
    assert playing.history.start > 1


async def test_a_reply_without_an_end_gets_one(tokenizer: HFTokenizer):
    engine = RecordingEngine(tokenizer, reply=lambda _: "a reply that is longer than its limit")
    agent = Agent(Policies(engine, MemoryStore()), engine)
    playing = episode(agent, sampling={"max_tokens": 4})
    step = await take(agent, playing)
    assert step.answer["finish_reason"] == "length"
    assert step.span.token_ids[-1] == engine.prompt.terminator
    assert list(step.span.loss_mask[-5:]) == [1, 1, 1, 1, 0], "the end-of-turn token was forced"


async def test_a_dead_engine_is_one_plain_error_however_many_passes(agent: Agent, engine: RecordingEngine):
    playing = episode(agent, **discrete("go to the door", "go to the window", "wait"))
    engine.die()
    with pytest.raises(EngineUnavailable):
        await take(agent, playing)
    assert playing.state == EpisodeState()
