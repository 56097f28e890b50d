"""The generic description: actions survive the conversion to JSON and back, observations become compact JSON."""

import json
import re
import string
from typing import Any

import gymnasium
import jsonschema
import numpy as np
import pytest
import xgrammar
from gymnasium import spaces
from xgrammar.testing import _is_grammar_accept_string

from service.environments import describe
from service.environments.generic import GenericText, from_json, schema, to_json


class Bare(gymnasium.Env[Any, Any]):
    def __init__(self, action_space: spaces.Space[Any], observation_space: spaces.Space[Any] | None = None) -> None:
        self.action_space = action_space
        self.observation_space = observation_space or spaces.Discrete(2)


SPACES = [
    spaces.Discrete(3000),
    spaces.Discrete(1),
    spaces.MultiDiscrete([2, 5, 3]),
    spaces.MultiDiscrete([[2, 5], [3, 9]], start=[[1, 0], [-2, 4]]),
    spaces.MultiBinary(4),
    spaces.MultiBinary((2, 3)),
    spaces.Box(-1.0, 1.0, (2,), np.float32),
    spaces.Box(np.float32(0.1), np.float32(0.3), (2, 2)),
    spaces.Box(-np.inf, np.inf, (), np.float64),
    spaces.Box(0, 255, (2, 2), np.uint8),
    spaces.Box(0.0, 1.0, (0,)),
    spaces.Box(0.0, 1.0, (2, 0)),
    spaces.Tuple(()),
    spaces.Dict({}),
    spaces.Text(5),
    spaces.Text(3, min_length=0, charset="]^-[ä€ "),
    spaces.Sequence(spaces.Discrete(3)),
    spaces.Sequence(spaces.Box(-1.0, 1.0, (2,), np.float64), stack=True),
    spaces.OneOf((spaces.Discrete(3), spaces.MultiBinary(2), spaces.Text(2))),
    spaces.Tuple((spaces.Discrete(3, start=-1), spaces.Box(0.0, 1.0, (1,)))),
    spaces.Dict(
        {"gear": spaces.Discrete(5), "pedals": spaces.Box(np.array([0, -1.0]), np.array([1, 2.0]), dtype=np.float64)}
    ),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_actions_survive_json(space: spaces.Space[Any]):
    space.seed(0)
    validator = jsonschema.Draft202012Validator(schema(space))
    validator.check_schema(validator.schema)
    for _ in range(20):
        action = space.sample()
        value = json.loads(json.dumps(exact(action)))
        validator.validate(value)
        again = from_json(space, value)
        assert space.contains(again)
        assert exact(again) == value


def exact(value: Any) -> Any:
    """Converts an action to a JSON value without rounding."""
    if isinstance(value, dict):
        return {name: exact(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [exact(part) for part in value]
    return value if isinstance(value, str) else np.asarray(value).tolist()


CHARACTERS = ["abc", "^", "^a", "^_`a", "]^-\\[\"'\n", string.printable, "a\U0001f600\U0001f601"]


@pytest.mark.parametrize("charset", CHARACTERS)
def test_the_pattern_of_a_text_space_allows_exactly_its_texts(charset: str):
    space = spaces.Text(3, charset=charset, seed=0)
    description = GenericText(Bare(space))
    pattern = description.action_space["pattern"]
    grammar = xgrammar.Grammar.from_regex(pattern)  # engines do not read all patterns as Python does
    for text in [*(space.sample() for _ in range(50)), "", "aaaa", *map(chr, range(128)), "ß", "\\u"]:
        assert bool(re.fullmatch(pattern, text)) == space.contains(text), text
        assert _is_grammar_accept_string(grammar, text) == space.contains(text), text
        if space.contains(text):
            assert description.action(text) == text


def test_a_text_that_is_no_action_is_refused():
    with pytest.raises(ValueError, match="not an action"):
        GenericText(Bare(spaces.Text(8, charset="abc"))).action("hello")


@pytest.mark.parametrize(
    ("space", "value"),
    [
        (spaces.OneOf((spaces.Discrete(2),)), [3, 0]),
        (spaces.OneOf((spaces.Discrete(2),)), 0),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"b": 1}),
        (spaces.Tuple((spaces.Discrete(2),)), []),
        (spaces.Box(0, 255, (1,), np.uint8), [256]),
        (spaces.Discrete(2000), None),
        (spaces.MultiBinary(2), "x"),
    ],
    ids=str,
)
def test_a_value_of_another_shape_is_refused(space: spaces.Space[Any], value: Any):
    with pytest.raises(ValueError, match="not an action"):
        from_json(space, value)


def test_small_discrete_actions_are_named_by_their_numbers():
    description = GenericText(Bare(spaces.Discrete(3, start=4)))
    assert description.action_space == {"type": "discrete", "actions": ["4", "5", "6"]}
    assert description.action("6") == 6
    assert spaces.Discrete(3, start=4).contains(description.action("4"))


def test_bounds_appear_where_they_are_finite():
    low, high = np.array([-1.0, -np.inf]), np.array([np.inf, 2.0])
    assert schema(spaces.Box(low, high, dtype=np.float64))["prefixItems"] == [
        {"type": "number", "minimum": -1.0},
        {"type": "number", "maximum": 2.0},
    ]


def test_an_array_of_the_wrong_length_is_refused_by_schema_and_by_conversion():
    space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate([0.5], schema(space))
    with pytest.raises(ValueError, match="not an action"):
        from_json(space, [0.5, 0.5, 0.5])


def test_a_number_out_of_bounds_is_refused():
    with pytest.raises(ValueError, match="not an action"):
        from_json(spaces.Box(-1.0, 1.0, (1,), np.float32), [1.5])


class Words(spaces.Space[str]):
    """A space that only its author knows."""


@pytest.mark.parametrize(
    ("space", "named"),
    [
        (spaces.Graph(spaces.Discrete(2), None), "Graph"),
        (spaces.Tuple((spaces.Discrete(2), Words())), "Words"),
        (spaces.Box(0.0, 1.0, (100, 100)), "10000 elements"),
        (spaces.Tuple((spaces.Text(3, charset='a"'),)), "character '\"'"),
        (spaces.Text(3, min_length=0, charset=""), "without characters"),
    ],
)
def test_a_space_that_text_cannot_carry_is_refused_by_name(space: spaces.Space[Any], named: str):
    with pytest.raises(ValueError, match=named):
        GenericText(Bare(space))


def test_a_string_is_shown_without_quotes():
    description = GenericText(Bare(spaces.Discrete(2)))
    assert description.observation('say "hi"\n', {}) == 'say "hi"\n'
    assert description.observation(np.str_("hi"), {}) == "hi"
    assert description.observation(["hi"], {}) == '["hi"]'


def test_observations_are_compact_json():
    description = GenericText(Bare(spaces.Discrete(2)))
    observation = {"position": np.array([0.1, -2.0], dtype=np.float32), "card": (np.int64(3), True), "far": np.inf}
    assert description.observation(observation, {}) == '{"position":[0.1,-2.0],"card":[3,true],"far":"inf"}'


def test_floats_keep_six_significant_digits():
    assert to_json(np.float64(123456.789)) == 123457.0
    assert to_json(1e-9 / 3) == 3.33333e-10


def test_success_is_unknown():
    description = GenericText(Bare(spaces.Discrete(2)))
    assert description.success(1.0, True, False, 1.0) is None


def test_describe_falls_back_to_the_spaces():
    description = describe(Bare(spaces.Discrete(2)))
    assert description.action_space == {"type": "discrete", "actions": ["0", "1"]}
    assert "Bare" in description.instructions


class Described(Bare):
    """An environment with its own text description."""

    text_description: Any = GenericText


def test_an_environment_s_own_description_is_used():
    env = Described(spaces.Discrete(2))
    assert isinstance(describe(env), GenericText)
    env.text_description = GenericText(env)
    assert describe(env) is env.text_description
