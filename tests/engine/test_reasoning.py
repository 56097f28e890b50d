"""Thoughts: their maximum length, their tags, their tokens in the log, and whether later windows contain them."""

from typing import Any

import pytest

from service.agent.agent import Agent
from service.agent.options import Options
from service.agent.policies import Policies
from service.api.http.serialization import as_tokens
from service.engine.completion import Completion
from service.engine.prompt import Prompt
from service.engine.tokenizer import HFTokenizer
from service.errors import Unprocessable
from service.sessions.episode import Episode
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import EpisodeConfig, StoredEpisode
from tests.support.acts import take

DISCRETE: dict[str, Any] = {"type": "discrete", "actions": ["left", "right"]}


def build(tokenizer: HFTokenizer, thought: str, **request: Any) -> tuple[Agent, Episode]:
    engine = ScriptedEngine(tokenizer, reply=lambda prompt: thought if prompt.endswith("<think>\n") else "go")
    agent = Agent(Policies(engine, MemoryStore()), engine)
    fields = {"action_space": DISCRETE, "reasoning": {"max_tokens": 16}, **request}
    return agent, Episode(
        StoredEpisode(EpisodeConfig("e", {"policy": "scripted", **fields}, b"", "v", 0.0)),
        Options.of(fields, engine.info),
        engine.history(),
    )


async def test_the_policy_thinks_and_then_acts(tokenizer: HFTokenizer):
    agent, episode = build(tokenizer, "left is icy</think>")
    step = await take(agent, episode)
    assert step.answer["reasoning"] == "left is icy"
    assert step.answer["action"] in DISCRETE["actions"]
    text = tokenizer.decode(step.span.token_ids)
    assert text.endswith(f"<think>\nleft is icy</think>\n\n{step.answer['action']}")
    assert tokenizer.decode(agent.engine.prompts[-1]).endswith("left is icy</think>\n\n"), (
        "the prompt of the action lacks the thought"
    )


async def test_what_it_drew_has_a_logprob_and_what_was_put_there_has_none(tokenizer: HFTokenizer):
    agent, episode = build(tokenizer, "one two three four five six seven eight nine ten eleven twelve thirteen")
    step = await take(agent, episode)
    drawn = [i for i, mask in enumerate(step.span.loss_mask) if mask]
    assert all(step.span.logprobs[i] == -0.5 for i in drawn[:16]), "the first 16 drawn tokens are not the thought"
    assert "</think>\n\n" in tokenizer.decode(step.span.token_ids[drawn[15] :]), (
        "the thought is not closed at its maximum length"
    )
    assert step.answer["usage"]["completion_tokens"] >= 17
    assert len(drawn) == 16 + sum(step.span.loss_mask[drawn[15] + 1 :])


async def test_an_ended_turn_is_an_ended_thought(tokenizer: HFTokenizer):
    agent, episode = build(tokenizer, "I am done")
    step = await take(agent, episode)
    assert step.answer["reasoning"] == "I am done"
    assert agent.engine.prompt.terminator not in agent.engine.prompts[-1][-8:], (
        "the action was drawn after the end of a turn"
    )
    assert tokenizer.decode(agent.engine.prompts[-1]).endswith("I am done</think>\n\n")


@pytest.mark.parametrize("history", ["keep", "drop"])
async def test_later_prompts_keep_or_drop_it(tokenizer: HFTokenizer, history: str):
    agent, episode = build(tokenizer, "left is icy</think>", reasoning={"max_tokens": 16, "history": history})
    first, second, third = [await take(agent, episode, name) for name in ("look", "again", "more")]
    prompt = tokenizer.decode(agent.engine.prompts[-1])
    assert prompt.count("left is icy") == (3 if history == "keep" else 1)
    assert prompt.count("<think>") == (3 if history == "keep" else 1)
    assert first.answer["action"] in prompt
    rows = [first, second, third]
    record = StoredEpisode(episode.config, episode.state)
    segments = as_tokens(record, rows)["segments"]
    assert len(segments) == (1 if history == "keep" else 3)
    assert sum(sum(segment["loss_mask"]) for segment in segments) == sum(sum(row.span.loss_mask) for row in rows)
    last = segments[-1]["token_ids"]
    assert last[: len(agent.engine.prompts[-1])] == agent.engine.prompts[-1], (
        "the export differs from what the policy saw"
    )
    restored = Episode(record, episode.options, agent.engine.history(), rows)
    assert restored.history.window(1) == episode.history.window(1)


async def test_the_models_own_tags_end_a_thought_by_their_token(tokenizer: HFTokenizer):
    names = tokenizer.control_tokens
    start, end = sorted(names)[:2]
    prompt = Prompt(tokenizer, (start, end))
    assert prompt.think_tags.stop_token_ids == (names[end],)
    assert prompt.think_tags.stop == ()
    silent = prompt.next_turn("x")
    assert silent[-len(prompt.think_tags.silence) :] == prompt.think_tags.silence
    assert names[end] in prompt.think_tags.silence, "the empty thought lacks the end tag"
    assert names[end] not in prompt.next_turn("x", thinks=True)[-len(prompt.think_tags.start) :]


def test_a_budget_that_leaves_no_room_is_refused(tokenizer: HFTokenizer):
    with pytest.raises(Unprocessable, match="thought"):
        build(tokenizer, "x", reasoning={"max_tokens": 5000})


async def test_the_window_leaves_room_for_the_thought(tokenizer: HFTokenizer):
    agent, episode = build(tokenizer, "word " * 30, reasoning={"max_tokens": 24}, context={"max_tokens": 160})
    for number in range(12):
        await take(agent, episode, f"observation {number}")
    assert max(map(len, agent.engine.prompts)) <= 160
    assert episode.state.step == 12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries that vLLM imports
def test_the_tags_are_those_of_vllms_reasoning_parser():
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    from service.engine.vllm.loading import _think_tags
    from tests.conftest import POLICY

    known = AutoTokenizer.from_pretrained(POLICY)
    known.add_tokens(["<think>", "</think>"])
    config = SimpleNamespace(structured_outputs_config=SimpleNamespace(reasoning_parser="deepseek_r1"))
    llm = SimpleNamespace(vllm_config=config, get_tokenizer=lambda: known)
    assert _think_tags(llm) == ("<think>", "</think>")
    prompt = Prompt(HFTokenizer(known), _think_tags(llm))
    assert prompt.think_tags.stop_token_ids == (known.convert_tokens_to_ids("</think>"),)
    config.structured_outputs_config.reasoning_parser = ""
    assert _think_tags(llm) is None


async def test_any_token_that_ends_a_turn_ends_a_thought_that_is_not_closed(
    tokenizer: HFTokenizer, monkeypatch: pytest.MonkeyPatch
):
    """A model's configuration may define more of these tokens than its tokenizer."""
    agent, episode = build(tokenizer, "left")
    other = tokenizer.encode("z")[0]

    async def generate(prompt: Any, sampling: Any, *_: Any, **__: Any) -> Completion:
        ids = (*tokenizer.encode("left"), other)
        return Completion(ids, (-0.5,) * len(ids), "left", "stop", 0)

    monkeypatch.setattr(agent.engine, "generate", generate)
    step = await take(agent, episode)
    assert tokenizer.decode(step.span.token_ids).endswith(f"left</think>\n\n{step.answer['action']}")
