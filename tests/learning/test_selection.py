"""Which tokens are trained, with which weights: imitation, pairs and advantages, and data with nothing to learn."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.learning import TrainingRefused
from service.learning.options import Options
from service.learning.segments import Kind, Row
from service.learning.selection import select
from service.learning.trajectories import Episode
from service.learning.units import Selection


def row(steps: Sequence[int] = (0, 1), kinds: Sequence[Kind] | None = None) -> Row:
    number = len(steps)
    chosen = kinds or [Kind.ALL] * number
    return Row(
        token_ids=np.arange(2 * number + 1, dtype=np.int32),
        positions=np.arange(1, 2 * number, 2, dtype=np.int32),
        kinds=np.array(chosen, np.int32),
        logprobs=np.full(number, -1, np.float32),
        steps=np.array(steps, np.int32),
        support_ids=np.empty(0, np.int32),
        support_sizes=np.zeros(number, np.int32),
        temperature=1.0,
        versions=("v",),
    )


def episode(name: str, score: float | None = 0.0, **fields: Any) -> Episode:
    defaults: dict[str, Any] = {
        "policy": "tiny",
        "group": "g",
        "situation": None,
        "parent": None,
        "stop_reason": "terminated",
        "success": None,
        "is_greedy": False,
        "rewards": None,
        "ratings": {},
        "rows": (row(),),
    }
    return Episode(episode_id=name, episode_return=score, **{**defaults, **fields})


def chosen(episodes: Sequence[Episode], method: Any, **options: Any) -> Selection:
    return select(episodes, Options(method, **options))


def weights(selection: Selection) -> list[list[float]]:
    return [example.weights.tolist() for unit in selection.units for example in unit]


# Behaviour cloning


def test_successes_are_imitated_without_the_actions_of_others():
    mixed = (row(kinds=[Kind.RECORDED, Kind.IDS]),)
    given = [
        episode("a", success=True),
        episode("b", success=False),
        episode("c"),
        episode("d", success=True, rows=mixed),
    ]
    found = chosen(given, "bc")
    assert weights(found) == [[1, 1], [1]]
    assert found.units[1][0].row.steps.tolist() == [1]
    assert (found.num_used, found.excluded) == (2, {"not kept": 2})


def test_recorded_actions_are_imitated():
    mixed = (row(kinds=[Kind.RECORDED, Kind.IDS]),)
    found = chosen([episode("a", rows=mixed), episode("b", success=True)], "bc", keep=("recorded",))
    assert [example.row.steps.tolist() for (example,) in found.units] == [[0]]
    both = chosen([episode("a", rows=mixed), episode("b", success=True)], "bc", keep=("recorded", "success"))
    assert weights(both) == [[1], [1, 1]]


def test_the_best_of_each_group_are_imitated():
    scores = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 0.0}
    given = [episode(name, score) for name, score in scores.items()]
    given += [episode(f"other {name}", 10.0, group="other") for name in "xy"]
    given += [
        episode("seed 1", 5.0, group=None, situation=("env", "1")),
        episode("seed 2", 6.0, group=None, situation=("env", "2")),
    ]
    found = chosen(given, "bc", keep=("top:0.5",))
    assert found.num_used == 2
    assert found.mean_return == 2.5
    assert chosen(given, "bc", keep=("top:0.1",)).mean_return == 3.0


def test_ratings_are_weights():
    rated = {None: 3.0, 1: 5.0}
    found = chosen([episode("a", ratings=rated), episode("b"), episode("c", ratings={0: 1.0})], "bc", keep=("rated",))
    assert weights(found) == [[0.5, 1.0]]


def test_a_weight_below_zero_is_not_imitated():
    given = [episode("a", success=True), episode("b", ratings={None: 0.0})]
    assert weights(chosen(given, "bc", keep=("rated", "success"))) == [[1, 1]]
    with pytest.raises(TrainingRefused, match="no step or episode has a rating above 1"):
        chosen(given[1:], "bc", keep=("rated",))


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("success", "none of the 2 episodes is a success (1 failed, 1 do not say)"),
        ("top:0.5", "in each group, all returns are equal"),
        ("recorded", "no action was recorded by somebody else"),
        ("rated", "no step or episode has a rating above 1"),
    ],
)
def test_nothing_to_imitate(keep: str, words: str):
    with pytest.raises(TrainingRefused) as refused:
        chosen([episode("a", success=False), episode("b")], "bc", keep=(keep,))
    assert words in str(refused.value)


def test_a_single_class_of_action_is_said():
    same = row((0,))
    found = chosen([episode("a", success=True, rows=(same,)), episode("b", success=True, rows=(same,))], "bc")
    assert "every trained token is the same one (id 1)" in found.warnings[0]
    assert chosen([episode("a", success=True)], "bc").warnings == []


# Episodes that were given up

GIVEN_UP = [
    episode("a", 2.0, success=True, ratings={None: 4.0}),
    episode("b", 1.0, success=False, ratings={None: 2.0}),
    episode("aborted", 9.0, success=True, ratings={None: 5.0}, stop_reason="aborted", rows=(row((0, 1, 2)),)),
    episode("idle", 0.0, ratings={None: 1.0}, stop_reason="idle_ttl", rows=(row((0, 1, 2)),)),
]


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("grpo", {}, [[0.5, 0.5], [-0.5, -0.5]]),
        ("dpo", {}, [[1, 1], [-1, -1]]),
        ("dpo", {"score": "rating"}, [[1, 1], [-1, -1]]),
        ("bc", {}, [[1, 1]]),
        ("bc", {"keep": ("top:0.5",)}, [[1, 1]]),
    ],
)
def test_episodes_that_were_given_up_are_left_out(method: str, options: Any, expected: list[list[float]]):
    found = chosen(GIVEN_UP, method, **options)
    assert weights(found) == expected
    assert found.excluded == {"aborted": 1, "idle_ttl": 1, **({"not kept": 1} if method == "bc" else {})}


def test_recorded_and_rated_actions_of_episodes_that_were_given_up_are_imitated():
    recorded = (row(kinds=[Kind.RECORDED, Kind.IDS]),)
    given = [episode("a", stop_reason="aborted", rows=recorded), *GIVEN_UP]
    assert weights(chosen(given, "bc", keep=("recorded",))) == [[1]]
    assert weights(chosen(given, "bc", keep=("rated",))) == [[0.75, 0.75], [0.25, 0.25], [1, 1, 1]]


# Groups


def test_forks_are_compared_with_their_parent():
    given = [
        episode("parent", 0.0, group=None),
        episode("fork", 4.0, group="parent", parent=("parent", 1), rows=(row((1, 2)),)),
    ]
    assert weights(chosen(given, "grpo")) == [[-2, -2], [2, 2]]


def test_episodes_without_a_group_are_compared_by_environment_and_seed():
    seeds = {"a": "1", "b": "1", "c": "2"}
    given = [
        episode(name, float(place), group=None, situation=("env", seed))
        for place, (name, seed) in enumerate(seeds.items())
    ]
    found = chosen([*given, episode("alone", 9.0, group=None)], "grpo")
    assert weights(found) == [[-0.5, -0.5], [0.5, 0.5]]
    assert found.excluded == {"alone in its group": 2}


# DPO


def test_the_best_is_paired_with_the_worst():
    scores = {"a": 1.0, "b": 4.0, "c": 2.0, "d": 3.0, "e": 2.5}
    lengths = {name: place + 1 for place, name in enumerate(scores)}
    given = [episode(name, score, rows=(row(range(lengths[name])),)) for name, score in scores.items()]
    found = chosen(given, "dpo")
    pairs = [[(len(one.weights), one.weights[0]) for one in unit] for unit in found.units]
    assert pairs == [[(lengths["b"], 1), (lengths["a"], -1)], [(lengths["d"], 1), (lengths["c"], -1)]]
    assert found.excluded == {"no pair": 1}


def test_pairs_by_rating():
    given = [
        episode("a", 9.0, ratings={None: 2.0}),
        episode("b", 0.0, ratings={None: 4.0}, rows=(row((0, 1, 2)),)),
        episode("c", 5.0),
    ]
    found = chosen(given, "dpo", score="rating")
    assert weights(found) == [[1, 1, 1], [-1, -1]]
    assert found.excluded == {"no rating": 1}


def test_steps_that_a_pair_shares_do_not_count():
    given = [
        episode("parent", 0.0, group=None, rows=(row((0, 1, 2)),)),
        episode("fork", 4.0, group="parent", parent=("parent", 1), rows=(row((1, 2)),)),
    ]
    ((better, worse),) = chosen(given, "dpo").units
    assert (better.row.steps.tolist(), worse.row.steps.tolist()) == ([1, 2], [1, 2])


def test_a_rating_is_enough_for_a_pair():
    given = [episode("a", None, ratings={None: 2.0}), episode("b", None, ratings={None: 4.0})]
    assert weights(chosen(given, "dpo", score="rating")) == [[1, 1], [-1, -1]]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (3, [[1, 2, 3], [3]]),  # forked from the fork's own steps: the fork's first step is where they part
        (1, [[1, 2, 3], [1, 2, 3]]),
        (0, [[0, 1, 2, 3], [0, 1, 2, 3]]),  # forked from a step that the fork has from its parent
    ],
)
def test_steps_that_a_pair_shares_by_a_fork_of_a_fork_do_not_count(second: int, expected: list[list[int]]):
    given = [
        episode("parent", 4.0, group=None, rows=(row((0, 1, 2, 3)),)),
        episode("fork", 2.0, group="parent", parent=("parent", 1), rows=(row((1, 2, 3)),)),
        episode("fork of it", 0.0, group="parent", parent=("fork", second), rows=(row(range(second, 4)),)),
    ]
    ((better, worse),) = chosen(given, "dpo").units
    assert [side.row.steps.tolist() for side in (better, worse)] == expected
    (unit,) = chosen([replace(given[0], stop_reason="aborted"), *given[1:]], "dpo").units
    assert unit[0].row.steps.tolist() == [step for step in (1, 2, 3) if step >= second]


def test_episodes_that_name_each_other_as_parents_are_compared():
    given = [episode("a", 1.0, parent=("b", 1)), episode("b", 0.0, parent=("a", 1))]
    ((better, worse),) = chosen(given, "dpo").units
    assert [side.row.steps.tolist() for side in (better, worse)] == [[1], [1]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([episode("a", 1.0), episode("b", 1.0)], "nothing to learn: in each of the 1 groups, every return is equal"),
        ([episode("a", 1.0), episode("b", 2.0, group="other")], "nothing to compare"),
        ([episode("a", None), episode("b", None)], "nothing to compare"),
    ],
)
def test_no_pairs(given: list[Episode], words: str):
    with pytest.raises(TrainingRefused) as refused:
        chosen(given, "dpo")
    assert words in str(refused.value)


# GRPO


def test_the_advantage_is_the_return_minus_the_mean_of_the_group():
    given = [episode("a", 1.0), episode("b", 0.0), episode("c", 0.0), episode("d", 0.0)]
    given += [episode("e", 0.1, group="equal"), episode("f", 0.1, group="equal"), episode("g", 0.1, group="equal")]
    given += [episode("greedy", 1.0, is_greedy=True), episode("unscored", None)]
    found = chosen(given, "grpo")
    assert weights(found) == [[0.75] * 2] + [[-0.25] * 2] * 3
    reasons = {"return equals the mean of its group": 3, "greedy (temperature 0)": 1, "no return": 1}
    assert found.excluded == reasons
    assert found.as_json()["episodes_used"] == 4
    assert found.as_json()["steps"] == 8


def test_actions_of_others_get_no_advantage():
    mixed = (row(kinds=[Kind.RECORDED, Kind.IDS]),)
    assert weights(chosen([episode("a", 1.0, rows=mixed), episode("b", 0.0)], "grpo")) == [[0.5], [-0.5, -0.5]]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([episode("a", 0.1), episode("b", 0.1), episode("c", 0.1)], "where all plays of a seed score the same"),
        ([episode("a", 1.0), episode("b", 2.0, group="other")], "2 alone in its group"),
        ([episode("a", 1.0, is_greedy=True), episode("b", 2.0, is_greedy=True)], "--temperature 1"),
        ([episode("a", None), episode("b", 2.0)], "1 no return"),
    ],
)
def test_nothing_to_learn_by_grpo(given: list[Episode], words: str):
    with pytest.raises(TrainingRefused) as refused:
        chosen(given, "grpo")
    assert str(refused.value).startswith("nothing to learn")
    assert words in str(refused.value)


@pytest.mark.parametrize("method", ["grpo", "dpo", "bc"])
def test_episodes_can_be_compared_that_begin_with_the_same_prompt(method: str):
    other = row()
    other.token_ids[0] = 7
    given = [
        episode(f"{of}{score}", score, group=of, rows=(of_row,))
        for of, of_row in (("a", row()), ("b", other))
        for score in (1.0, 2.0)
    ]
    apart = [replace(one, group=one.episode_id) for one in given]
    options: Any = {"keep": ("top:0.5",)} if method == "bc" else {}
    assert weights(chosen(apart, method, group_by="start", **options)) == weights(chosen(given, method, **options))
    with pytest.raises(TrainingRefused):
        chosen(apart, method, **options)


def test_with_a_discount_each_step_has_the_return_from_it_on():
    """Values: 0.5, 1 and -0.5, -1, 0; their mean is 0."""
    late = row(steps=(0, 1, 2))
    given = [episode("a", 1.0, rewards=[0.0, 1.0]), episode("b", -1.0, rewards=[0.0, -1.0, 0.0], rows=(late,))]
    assert weights(chosen(given, "grpo", discount=0.5)) == [[0.5, 1.0], [-0.5, -1.0, 0.0]]


def test_a_discount_counts_the_own_steps_of_a_fork():
    fork = episode("fork", 3.0, parent=("a", 1), group="a", rewards=[3.0], rows=(row(steps=(1,)),))
    given = [episode("a", 1.0, group=None, rewards=[0.0, 1.0]), fork]
    assert np.allclose(np.concatenate(weights(chosen(given, "grpo", discount=1.0))), [-2 / 3, -2 / 3, 4 / 3])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ([episode("a", 1.0), episode("b")], "does not have the reward of each step"),
        ([episode("a", rewards=[1.0, 1.0]), episode("b", group="other", rewards=[0.0, 1.0])], "nothing to learn"),
        ([episode(name, rewards=[0.0, 0.0]) for name in "ab"], "nothing to learn"),
        ([episode(name, rewards=[1.0, 0.0], rows=(row((-1, -1)),)) for name in "ab"], "does not have the reward"),
    ],
)
def test_refusals_with_a_discount(given: list[Episode], error: str):
    with pytest.raises(TrainingRefused, match=error):
        chosen(given, "grpo", discount=0.9)


def test_filtered_tokens_are_refused_by_grpo_only_and_always_reported():
    filtered = (row(kinds=[Kind.FILTERED, Kind.IDS]),)
    given = [episode("a", 1.0, success=True, rows=filtered), episode("b", 0.0)]
    with pytest.raises(
        TrainingRefused, match=r"25.0% of the trained tokens were drawn from a filtered.*--allow-filtered"
    ):
        chosen(given, "grpo")
    for found in (chosen(given, "grpo", allow_filtered=True), chosen(given, "bc"), chosen(given, "dpo")):
        assert found.kinds()["filtered"] > 0
        assert any("filtered distribution" in warning for warning in found.warnings)
