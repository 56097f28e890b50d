"""Reading an export: what is kept of it, older formats, forks, and files that cannot be used."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.filters import EpisodeFilter
from service.learning import TrainingRefused
from service.learning.segments import Kind, Row
from service.learning.trajectories import Episode, freeze, matches, read
from tests.support.trajectories import Player, write


def one(document: Any, folder: Path) -> Episode:
    (episode,) = read(write([document], folder / "export.ndjson")).episodes
    return episode


def test_a_row_has_the_tokens_that_were_drawn_or_recorded(player: Player, tmp_path: Path):
    document = player.play("e", num_steps=3, recorded=(1,), temperature=0.5)
    (row,) = one(document, tmp_path).rows
    (segment,) = document["segments"]
    ends = [start - 2 for start in [*segment["step_starts"][1:], len(row.token_ids)]]
    assert row.positions.tolist() == ends
    assert row.kinds.tolist() == [Kind.IDS, Kind.RECORDED, Kind.IDS]
    assert row.steps.tolist() == [0, 1, 2]
    assert row.support_sizes.tolist() == [4, 0, 4]
    assert row.logprobs[1] == 0
    assert row.temperature == 0.5
    taken = row.take(np.array([False, True, True]))
    assert (taken.steps.tolist(), taken.support_ids.tolist()) == ([1, 2], [10, 11, 12, 13])


def test_tokens_of_an_older_export_count_as_filtered(player: Player, tmp_path: Path):
    document = player.play("e")
    for name in ("support", "temperature", "recorded_mask", "step_starts", "rewards"):
        del document["segments"][0][name]
    found = one(document, tmp_path)
    (row,) = found.rows
    assert found.rewards is None
    assert row.kinds.tolist() == [Kind.FILTERED] * 3
    assert row.steps.tolist() == [-1] * 3
    assert row.temperature == 1.0


def test_a_forks_row_has_only_its_own_steps(player: Player, tmp_path: Path):
    document = player.play("fork", num_steps=5, parent={"episode_id": "e", "step": 3})
    document["segments"][0]["rewards"] = [1.0, 2.0, None, None, 4.0]
    found = one(document, tmp_path)
    (row,) = found.rows
    assert row.steps.tolist() == [3, 4]
    assert found.rewards == [0.0, 4.0]


def test_a_fork_in_an_older_export_is_refused_if_its_own_steps_cannot_be_told(player: Player, tmp_path: Path):
    document = player.play("fork", num_steps=5, parent={"episode_id": "e", "step": 3})
    del document["segments"][0]["step_starts"]
    with pytest.raises(TrainingRefused, match=r"is a fork.*Export it again"):
        one(document, tmp_path)
    document["episode"]["parent"]["step"] = 5
    assert one(document, tmp_path).rows == ()


def test_ratings_are_averaged_by_step(player: Player, tmp_path: Path):
    document = player.play("e")
    rated = [(None, 5), (None, 2), (1, 4)]
    document["feedback"] = [{"step": step, "rating": rating} for step, rating in rated]
    assert one(document, tmp_path).ratings == {None: 3.5, 1: 4.0}


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ({}, 2),
        ({"status": "active"}, 1),
        ({"tag": "good"}, 1),
        ({"success": True}, 1),
        ({"success": False}, 0),
        ({"policy": "tiny"}, 2),
        ({"group": "g"}, 1),
        ({"env": "Tokens-v0"}, 2),
        ({"env": "Other-v0"}, 0),
        ({"metadata": {"seed": 7}}, 2),
        ({"metadata": {"seed": 8}}, 0),
        ({"since": 1_790_000_000}, 2),
        ({"since": "2030-01-01"}, 0),
        ({"until": "2030-01-01"}, 2),
        ({"until": 1_790_000_000}, 0),
    ],
)
def test_filters_mean_the_same_as_in_an_export(player: Player, where: EpisodeFilter, number: int):
    documents = [
        player.play("one", tags=["good"], success=True),
        player.play("two", group="g", success=None),
        player.play("three", status="active", success=None),
    ]
    assert sum(matches(document["episode"], where) for document in documents) == number


def test_filters_apply_to_a_file(player: Player, tmp_path: Path):
    path = write([player.play("one", tags=["good"]), player.play("two")], tmp_path / "export.ndjson")
    data = read(path, {"tag": "good"})
    assert ([episode.episode_id for episode in data.episodes], data.num_read) == (["one"], 2)
    assert data.digest != read(path).digest
    with pytest.raises(
        TrainingRefused, match=r"none of the 2 trajectories .* matches the filters \{'status': 'ended', 'tag': 'bad'\}"
    ):
        read(path, {"tag": "bad"})


def test_a_frozen_export_is_complete_or_absent(player: Player, tmp_path: Path):
    def cut() -> Any:
        yield player.play("e")
        raise ConnectionError

    path = tmp_path / "export.ndjson"
    with pytest.raises(ConnectionError):
        freeze(cut(), path)
    assert list(tmp_path.iterdir()) == []
    freeze([player.play("e")], path)
    assert len(read(path).episodes) == 1


def spoiled(change: Callable[[Any], None]) -> Callable[[Any], Any]:
    def apply(document: Any) -> Any:
        document = copy.deepcopy(document)
        change(document)
        return document

    return apply


def segment_with(**fields: Any) -> Callable[[Any], Any]:
    return spoiled(lambda document: document["segments"][0].update(fields))


def episode_with(**fields: Any) -> Callable[[Any], Any]:
    return spoiled(lambda document: document["episode"].update(fields))


def support_with(*, ids: list[int]) -> Callable[[Any], Any]:
    return spoiled(lambda document: next(filter(None, document["segments"][0]["support"])).update(ids=ids))


def with_token(token: Any) -> Callable[[Any], Any]:
    return spoiled(lambda document: document["segments"][0]["token_ids"].__setitem__(0, token))


def with_rating(rating: Any) -> Callable[[Any], Any]:
    return spoiled(lambda document: document.update(feedback=[{"step": None, "rating": rating}]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoiled(lambda d: d.pop("segments")), "line 2 has no `segments`. Export with --format tokens"),
        (spoiled(lambda d: d.pop("episode")), "line 2 is not a trajectory"),
        (
            episode_with(episode_return=float("nan")),
            "line 2: `episode.episode_return` should be a finite number, not nan",
        ),
        (episode_with(episode_return="high"), "`episode.episode_return` should be a valid number, not 'high'"),
        (episode_with(episode_return=10**400), "`episode.episode_return` should be a valid number, not 1000"),
        (episode_with(parent="e"), "line 2: `episode.parent` should be an object, not 'e'"),
        (episode_with(parent={"episode_id": "e"}), "line 2: `episode.parent.step` is missing"),
        (episode_with(parent={"episode_id": "e", "step": -1}), "`episode.parent.step` should be greater than or equal"),
        (episode_with(sampling=[]), "`episode.sampling` should be an object, not []"),
        (episode_with(metadata=["env"]), "`episode.metadata` should be an object, not ['env']"),
        (episode_with(tags=5), "`episode.tags` should be a valid list, not 5"),
        (episode_with(group=["g"]), "`episode.group` should be a valid string, not ['g']"),
        (episode_with(created_at="today"), "`episode.created_at` should be a valid number, not 'today'"),
        (episode_with(success=1), "`episode.success` should be a valid boolean, not 1"),
        (spoiled(lambda d: d.update(feedback=["x"])), "line 2: `feedback.0` should be an object, not 'x'"),
        (with_rating("x"), "line 2: `feedback.0.rating` should be a valid number, not 'x'"),
        (with_rating(0), "`feedback.0.rating` should be greater than or equal to 1, not 0"),
        (with_rating(6), "`feedback.0.rating` should be less than or equal to 5, not 6"),
        (with_rating(float("nan")), "`feedback.0.rating` should be"),
        (spoiled(lambda d: d.update(segments=[None])), "line 2, segment 0: it should be an object, not None"),
        (spoiled(lambda d: d.update(segments=[7])), "line 2, segment 0: it should be an object, not 7"),
        (segment_with(loss_mask=[1]), "differ in length"),
        (segment_with(loss_mask=[0.5]), "`loss_mask.0` should be 0 or 1, not 0.5"),
        (segment_with(temperature=0.0), "`temperature` should be greater than 0, not 0.0"),
        (segment_with(steps=[]), "step_starts does not fit steps"),
        (with_token(-1), "`token_ids.0` should be greater than or equal to 0, not -1"),
        (with_token("x"), "line 2, segment 0: `token_ids.0` should be a valid integer, not 'x'"),
        (with_token(22.7), "`token_ids.0` should be a valid integer, not 22.7"),
        (with_token(1 << 40), "`token_ids.0` should be less than 2147483648"),
        (spoiled(lambda d: d["segments"][0].pop("logprobs")), "line 2, segment 0: `logprobs` is missing"),
        (segment_with(rewards=[0.5]), "line 2: `rewards` does not fit `steps`"),
        (segment_with(rewards=5), "`rewards` should be a valid list, not 5"),
        (segment_with(rewards=[0.5, None, float("inf")]), "`rewards.2` should be a finite number, not inf"),
        (segment_with(rewards=[0.5, None, 10**400]), "`rewards.2` should be a valid number, not 1000"),
        (segment_with(steps=[0, 1, 3]), "line 2: the `steps` of all segments together are not 0, 1, 2, and so on"),
        (segment_with(step_starts=[0]), "step_starts does not fit steps"),
        (segment_with(step_starts=[8, 9, 10]), "a token before the first step has the mask 1"),
        (segment_with(support=[None]), "support and token_ids differ in length"),
        (spoiled(lambda d: d["segments"][0]["support"].append(None)), "support and token_ids differ in length"),
        (support_with(ids=[10, 11, 12, 13, -1]), "should be greater than or equal to 0, not -1"),
        (support_with(ids=[10, 11, 12, 13, 11]), "has an id twice"),
        (support_with(ids=[]), "is not in its own support"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(player: Player, spoil: Callable[[Any], Any], words: str, tmp_path: Path):
    document = player.play("e")
    path = write([document, spoil(document)], tmp_path / "export.ndjson")
    with pytest.raises(TrainingRefused) as refused:
        read(path)
    assert words in str(refused.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_a_logprob_that_is_none_is_refused(player: Player, value: float, tmp_path: Path):
    document = player.play("e")
    (segment,) = document["segments"]
    segment["logprobs"][segment["loss_mask"].index(1)] = value
    with pytest.raises(TrainingRefused, match="a log-probability is not a number, or above 0"):
        one(document, tmp_path)


def test_a_token_outside_of_its_support_is_refused(player: Player, tmp_path: Path):
    document = player.play("e")
    (segment,) = document["segments"]
    segment["token_ids"][segment["loss_mask"].index(1)] = 9
    with pytest.raises(TrainingRefused, match="is not in its own support"):
        one(document, tmp_path)


@pytest.mark.parametrize(
    ("episode_return", "rewards", "expected"),
    [
        (None, [None, None, None], None),
        (0.0, [None, None, None], None),
        (0.0, [None, 0.0, None], 0.0),
        (0.0, [1.0, None, -1.0], 0.0),
        (2.0, [None, None, None], 2.0),  # a reward came with the first observation
        (0.0, None, 0.0),  # of an older version
    ],
)
def test_a_missing_return_stays_missing(
    player: Player, episode_return: Any, rewards: Any, expected: float | None, tmp_path: Path
):
    document = player.play("e", episode_return=episode_return)
    document["segments"][0]["rewards"] = rewards
    assert one(document, tmp_path).episode_return == expected


@pytest.mark.parametrize(("reason", "has_result"), [("aborted", False), ("idle_ttl", False), ("max_steps", True)])
def test_an_episode_that_was_given_up_has_no_result(player: Player, reason: str, has_result: bool, tmp_path: Path):
    assert one(player.play("e", stop_reason=reason), tmp_path).has_result == has_result


def test_files_that_cannot_be_used(player: Player, tmp_path: Path):
    path = tmp_path / "export.ndjson"
    with pytest.raises(TrainingRefused, match=r"export.ndjson cannot be read: No such file"):
        read(path)
    path.touch()
    with pytest.raises(TrainingRefused, match="is empty"):
        read(path)
    write([player.play("e"), player.play("e")], path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TrainingRefused, match="line 2: the line is cut off, so the file is incomplete"):
        read(path)
    for text in ("nonsense\n", "[" * 100_000 + "\n"):
        path.write_text(text)
        with pytest.raises(TrainingRefused, match="line 1 is not JSON"):
            read(path)


def test_rows_are_compact(player: Player, tmp_path: Path):
    (row,) = one(player.play("e", num_steps=20), tmp_path).rows
    arrays = [getattr(row, name) for name in Row.__slots__ if isinstance(getattr(row, name), np.ndarray)]
    assert sum(array.nbytes for array in arrays) < 8 * len(row.token_ids) + 20 * (5 * 4 + 4 * 4)
