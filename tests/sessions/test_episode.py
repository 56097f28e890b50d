"""Tests of an episode: its options, the requests that it refuses, and the updates of its state."""

from dataclasses import replace
from typing import Any

import pytest

from service.agent.options import Options
from service.api.http.serialization import resource
from service.engine.base import EngineInfo
from service.engine.token_log import TokenLog
from service.errors import Conflict, Unprocessable
from service.sessions.acts import ActRequest
from service.sessions.episode import Episode
from service.trajectory import EpisodeConfig, EpisodeState, Message, Sampling, StopReason, StoredEpisode

INFO = EngineInfo("p", "v", 1000, Sampling(temperature=0.7, top_p=0.9, max_tokens=64))


def episode(state: EpisodeState | None = None, **request: Any) -> Episode:
    config = EpisodeConfig("e", {"policy": "p", **request}, b"", "v", 5.0)
    return Episode(StoredEpisode(config, state or EpisodeState()), Options.of(request, INFO), TokenLog())


def test_sampling_falls_back_on_the_policys_defaults():
    assert Options.of({}, INFO).sampling == INFO.default_sampling
    asked = {"temperature": 0, "top_k": 5, "min_p": None, "stop": ["\n"], "seed": 1}
    assert Options.of({"sampling": asked}, INFO).sampling == Sampling(0, 0.9, 5, 0.0, 64, 1, ("\n",))
    assert Options.of({"sampling": None, "context": None, "action_space": None}, INFO) == Options.of({}, INFO)


@pytest.mark.parametrize(
    ("request_", "limit", "max_tokens"),
    [
        ({}, 1000, 64),
        ({"context": {"max_tokens": 100}}, 100, 50),
        ({"context": {"max_tokens": 5000}}, 1000, 64),
        ({"context": {"max_tokens": None}}, 1000, 64),
        ({"sampling": {"max_tokens": 900}}, 1000, 500),
    ],
)
def test_a_reply_takes_at_most_half_of_the_context(request_: dict[str, Any], limit: int, max_tokens: int):
    options = Options.of(request_, INFO)
    assert (options.max_context_tokens, options.sampling.max_tokens) == (limit, max_tokens)


def test_a_reply_as_long_as_the_context_is_refused():
    with pytest.raises(Unprocessable):
        Options.of({"context": {"max_tokens": 100}, "sampling": {"max_tokens": 100}}, INFO)


DISCRETE = {"action_space": {"type": "discrete", "actions": ["a", "b", "c"]}}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, Message()),
        ({}, Message("x", success=True)),
        ({}, Message("x", legal_actions=("a",))),
        (DISCRETE, Message("x", legal_actions=())),
        (DISCRETE, Message("x", legal_actions=("a", "a"))),
        (DISCRETE, Message("x", legal_actions=("a", "z"))),
    ],
)
def test_a_message_that_the_episode_cannot_take(request_: dict[str, Any], message: Message):
    with pytest.raises(Unprocessable):
        episode(**request_).check_request(ActRequest(message, b""))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, Message("")),
        ({}, Message(terminated=True, success=False)),
        (DISCRETE, Message("x", legal_actions=("c", "a"))),
    ],
)
def test_a_message_that_it_can(request_: dict[str, Any], message: Message):
    episode(**request_).check_request(ActRequest(message, b""))


def test_an_ended_episode_says_why():
    with pytest.raises(Conflict) as conflict:
        episode(EpisodeState(status="ended", stop_reason=StopReason.MAX_STEPS)).check_active()
    assert conflict.value.context["stop_reason"] == "max_steps"


@pytest.mark.parametrize(
    ("overflow", "reason"), [("end", StopReason.CONTEXT_OVERFLOW), ("error", None), ("slide", None)]
)
def test_a_full_context_ends_the_episode_only_where_asked_to(overflow: str, reason: StopReason | None):
    full = episode(context={"overflow": overflow, "max_tokens": 100})
    if reason:
        assert full.overflow() == reason
    else:
        with pytest.raises(Conflict):
            full.overflow()


def test_success_counts_at_the_end_only():
    playing = episode()
    closing = playing.closing_step(ActRequest(Message(reward=-1.5, terminated=True, success=True), b""))
    state = playing.state_after(closing, StopReason.TERMINATED)
    assert (state.success, state.episode_return, state.step, state.ended_at) == (True, -1.5, 0, closing.created_at)
    going_on = playing.state_after(closing, None)
    assert (going_on.success, going_on.ended_at, going_on.status) == (None, None, "active")


def test_the_resource_is_the_request_and_the_head():
    body = resource(StoredEpisode(episode(goal="g").config, EpisodeState(step=3, episode_return=1.5)))
    assert (
        body.items() >= {"goal": "g", "step": 3, "episode_return": 1.5, "created_at": 5.0, "instructions": ""}.items()
    )


JSON: dict[str, Any] = {"action_space": {"type": "json", "schema": {"type": "integer"}}}


@pytest.mark.parametrize("space", [JSON, {"action_space": {"type": "regex", "pattern": "a+"}}])
def test_a_stop_string_that_would_cut_an_action_short_is_refused(space: dict[str, Any]):
    with pytest.raises(Unprocessable, match="stop"):
        Options.of({**space, "sampling": {"stop": ["0"]}}, INFO)
    assert Options.restored({**space, "sampling": {"stop": ["0"]}}, INFO).sampling.stop == ()


def test_a_restored_episode_is_cut_to_fit_and_otherwise_as_it_was():
    small = replace(INFO, max_model_len=100)
    request = {"sampling": {"max_tokens": 400}, "reasoning": {"max_tokens": 300}}
    restored = Options.restored(request, small)
    assert (restored.max_context_tokens, restored.sampling.max_tokens) == (100, 1)
    assert restored.reasoning is not None
    assert restored.reasoning.max_tokens == 98
    assert Options.restored(request, INFO) == Options.of(request, INFO)


def test_an_episode_whose_space_is_not_accepted_any_more_can_only_end():
    request: dict[str, Any] = {"policy": "p", "action_space": {"type": "json", "schema": {"type": 3}}}
    config = EpisodeConfig("e", request, b"", "v", 5.0)
    lost = Episode(StoredEpisode(config, EpisodeState()), Options.restored(request, INFO), TokenLog())
    with pytest.raises(Unprocessable, match="not accepted any more"):
        lost.check_request(ActRequest(Message("x"), b""))
    lost.check_request(ActRequest(Message(terminated=True), b""))


def test_rewards_that_sum_to_infinity_are_refused():
    with pytest.raises(Unprocessable, match="too large"):
        episode(EpisodeState(episode_return=1.7e308)).check_request(ActRequest(Message("x", reward=1.7e308), b""))
