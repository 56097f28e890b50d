"""The checker finds every kind of error, in a record that is correct except for this error."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest

from service.client import Act, Usage
from tests.faults.checker import check, check_retry, remember
from tests.faults.history import History, Taken

RECORDED = 3
NUM_STEPS = 6
Documents = tuple[dict[str, Any], dict[str, Any]]


def answered(index: int, action: str, num_tokens: int) -> Act:
    logprob = None if index == RECORDED else -0.5 * num_tokens
    usage = Usage(prompt_tokens=9, completion_tokens=num_tokens)
    return Act(episode_id="e", step=index, action=action, text=action, logprob=logprob, usage=usage)


def played() -> History:
    """An ended episode with six steps. The caller chose the action of one of them."""
    history, generator = History("e", "text"), random.Random(1)
    for index in range(NUM_STEPS):
        recorded = "by hand" if index == RECORDED else None
        sent = history.say(generator, recorded=recorded)
        history.take(sent, answered(index, recorded or f"word {index}", 0 if recorded else index + 1))
    sent = history.say(generator, terminated=True)
    history.take(sent, Act(episode_id="e", step=NUM_STEPS, done=True))
    return history


def stored_documents(history: History) -> Documents:
    """The trajectories, in the formats `steps` and `tokens`, of a service that stored everything correctly."""
    rewards = [*(taken.sent.reward for taken in history.steps[1:]), history.closing and history.closing.sent.reward]
    steps = [
        {**taken.answer.model_dump(), "observation": taken.sent.observation, "reward": reward}
        for taken, reward in zip(history.steps, rewards, strict=True)
    ]
    episode = {"status": "ended", "episode_return": sum(history.rewards)}
    segment: dict[str, list[Any]] = {"token_ids": [], "loss_mask": [], "logprobs": []}
    for taken in history.steps:
        num_drawn = taken.answer.usage.completion_tokens if taken.answer.usage else 0
        ids = [100 * taken.sent.step + place for place in range(2 + num_drawn)]
        segment["token_ids"] += ids
        segment["loss_mask"] += [0, 0] + [1] * num_drawn
        segment["logprobs"] += [0.0, 0.0] + [-0.5] * num_drawn
    return {"episode": episode, "steps": steps}, {"segments": [segment]}


def kinds(history: History, documents: Documents) -> set[str]:
    return {finding.kind for finding in check(history, *documents)}


def test_what_was_kept_as_it_was_answered_passes_each_time() -> None:
    history = played()
    documents = stored_documents(history)
    assert check(history, *documents) == []
    remember(history, documents[1])
    assert check(history, *documents) == []
    assert set(history.completions) == {0, 1, 2, 4, 5}


def lose_the_last(steps: dict[str, Any], _: dict[str, Any]) -> None:
    steps["steps"].pop()


def lose_one_between(steps: dict[str, Any], _: dict[str, Any]) -> None:
    del steps["steps"][2]


def take_one_twice(steps: dict[str, Any], _: dict[str, Any]) -> None:
    steps["steps"].append({**steps["steps"][-1], "step": NUM_STEPS})


def keep_one_row_twice(steps: dict[str, Any], _: dict[str, Any]) -> None:
    steps["steps"].insert(2, steps["steps"][2])


def change_the_action(steps: dict[str, Any], _: dict[str, Any]) -> None:
    steps["steps"][4]["action"] = "another word"


def change_the_logprob(steps: dict[str, Any], _: dict[str, Any]) -> None:
    steps["steps"][4]["logprob"] -= 0.01


def change_the_observation(steps: dict[str, Any], _: dict[str, Any]) -> None:
    steps["steps"][4]["observation"] = "something else"


def go_on_though_it_ended(steps: dict[str, Any], _: dict[str, Any]) -> None:
    steps["episode"]["status"] = "active"


def count_a_reward_twice(steps: dict[str, Any], _: dict[str, Any]) -> None:
    steps["episode"]["episode_return"] += steps["steps"][1]["reward"]


def move_a_reward(steps: dict[str, Any], _: dict[str, Any]) -> None:
    first, second = steps["steps"][:2]
    first["reward"], second["reward"] = second["reward"], first["reward"]


def change_a_turns_token(_: dict[str, Any], tokens: dict[str, Any]) -> None:
    tokens["segments"][0]["token_ids"][0] += 1


def change_a_drawn_token(_: dict[str, Any], tokens: dict[str, Any]) -> None:
    segment = tokens["segments"][0]
    segment["token_ids"][segment["loss_mask"].index(1)] += 1


def forget_that_a_token_was_drawn(_: dict[str, Any], tokens: dict[str, Any]) -> None:
    tokens["segments"][0]["loss_mask"][-1] = 0


def change_a_tokens_logprob(_: dict[str, Any], tokens: dict[str, Any]) -> None:
    tokens["segments"][0]["logprobs"][-1] -= 0.1


def lose_a_steps_tokens(_: dict[str, Any], tokens: dict[str, Any]) -> None:
    for values in tokens["segments"][0].values():
        del values[-(NUM_STEPS + 2) :]


TAMPERED: dict[Callable[..., None], set[str]] = {
    lose_the_last: {"loss", "reward"},
    lose_one_between: {"loss", "gap", "reward"},
    take_one_twice: {"double", "reward"},
    keep_one_row_twice: {"double", "reward"},
    change_the_action: {"changed"},
    change_the_logprob: {"changed"},
    change_the_observation: {"changed"},
    go_on_though_it_ended: {"changed"},
    count_a_reward_twice: {"reward"},
    move_a_reward: {"reward"},
    change_a_turns_token: {"tokens"},
    change_a_drawn_token: {"tokens"},
    forget_that_a_token_was_drawn: {"tokens"},
    change_a_tokens_logprob: {"tokens"},
    lose_a_steps_tokens: {"tokens"},
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_a_tampered_record_is_found(tamper: Callable[..., None]) -> None:
    history = played()
    documents = stored_documents(history)
    remember(history, documents[1])
    tampered = copy.deepcopy(documents)
    tamper(*tampered)
    assert kinds(history, tampered) == TAMPERED[tamper]


def test_a_fork_that_begins_with_other_tokens_than_its_parent_is_found() -> None:
    parent = played()
    documents = stored_documents(parent)
    remember(parent, documents[1])
    fork = parent.fork("f", NUM_STEPS)
    fork.closing = parent.closing
    assert check(fork, *documents) == []
    change_a_drawn_token(*documents)
    assert kinds(fork, documents) == {"tokens"}


def test_a_call_that_was_answered_as_another_step_is_found() -> None:
    history = played()
    documents = stored_documents(history)
    last = history.steps[-1]
    history.steps[-1] = Taken(last.sent, last.answer.model_copy(update={"step": NUM_STEPS}))
    assert kinds(history, documents) == {"double"}


def test_a_retry_gets_the_stored_answer_and_is_told_so() -> None:
    history = played()
    taken = history.steps[2]
    replayed = taken.answer.model_copy(update={"replayed": True})
    assert check_retry(history, taken, replayed) == []
    (finding,) = check_retry(history, taken, taken.answer)
    assert finding.kind == "retry"
    assert "replayed" in finding.detail
    (finding,) = check_retry(history, taken, replayed.model_copy(update={"action": "another"}))
    assert "action" in finding.detail
