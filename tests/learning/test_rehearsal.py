"""Rehearsal: what is imitated along is not unlearned, runs continue, and an export without own actions is refused."""

import json
from pathlib import Path

import pytest
from peft import PeftModel

from service.learning import NothingToLearn, TrainingInterrupted, TrainingRefused, adapter
from service.learning.options import Method
from service.learning.rehearsal import read_rehearsal
from service.learning.run import Base, train
from service.learning.trajectories import never, read
from tests.learning.test_run import Recorder, chance_of_first, files, options
from tests.support.trajectories import Player, load_model, write


@pytest.fixture
def base(tiny: Path) -> Base:
    return Base(str(tiny), "tiny")


@pytest.fixture
def other_game(player: Player, tmp_path: Path) -> Path:
    """Episodes in which the second action was always taken. The trained episodes reward the first."""
    documents = [player.play(f"other{number}", actions=(11, 12)) for number in range(12)]
    for document in documents:
        (segment,) = document["segments"]
        places = [place for place, drawn in enumerate(segment["loss_mask"]) if drawn]
        for place in places:
            segment["token_ids"][place] = 11
            segment["support"][place]["ids"] = [10, 11, 12, 13]
    return write(documents, tmp_path / "other.ndjson")


@pytest.mark.parametrize("method", ["bc", "dpo", "grpo"])
def test_what_is_rehearsed_is_not_unlearned(
    method: Method, base: Base, export: Path, other_game: Path, tiny: Path, tmp_path: Path
):
    chosen = options(method, keep=("top:0.25",)) if method == "bc" else options(method)
    chances = []
    for name, rehearse in (("without", None), ("with", other_game)):
        watcher = Recorder()
        train(chosen, export, base, tmp_path / name, rehearse=rehearse, watcher=watcher)
        figures = [progress.figures.get("rehearsal_loss") for progress in watcher.steps]
        assert all(value is not None for value in figures) == (rehearse is not None)
        model = PeftModel.from_pretrained(load_model(tiny), tmp_path / name).get_base_model()
        chances.append(chance_of_first(model, other_game))
    without, kept = chances
    assert kept < without - 0.02
    loss = [value for value in figures if value is not None]
    assert loss[-1] < loss[0]


def test_the_card_has_the_rehearsal(base: Base, export: Path, other_game: Path, tmp_path: Path):
    card = train(options(epochs=1), export, base, tmp_path / "out", rehearse=other_game)
    expected = {"digest": f"sha256:{read(other_game).digest}", "segments": 12, "trained_tokens": 36}
    assert card["rehearsal"] == expected
    assert train(options(epochs=1), export, base, tmp_path / "plain")["rehearsal"] is None


def test_a_stopped_run_continues_with_the_same_rehearsal(base: Base, export: Path, other_game: Path, tmp_path: Path):
    train(options(), export, base, tmp_path / "unbroken", rehearse=other_game)
    stopped = Recorder(stop_after=4)
    with pytest.raises(TrainingInterrupted):
        train(
            options(),
            export,
            base,
            tmp_path / "out",
            rehearse=other_game,
            watcher=stopped,
            should_stop=stopped.should_stop,
        )
    with pytest.raises(TrainingRefused, match="something else: rehearsal"):
        train(options(), export, base, tmp_path / "out", resume=True)
    train(options(), export, base, tmp_path / "out", rehearse=other_game, resume=True)
    assert files(tmp_path / "out")[adapter.WEIGHTS] == files(tmp_path / "unbroken")[adapter.WEIGHTS]


def test_only_own_actions_are_rehearsed(player: Player, tmp_path: Path):
    path = write([player.play("half", recorded=(0,)), player.play("none", recorded=(0, 1, 2))], tmp_path / "e.ndjson")
    rehearsal = read_rehearsal(path, never)
    assert (len(rehearsal.rows), rehearsal.num_tokens) == (1, 2)
    nothing = write([player.play("none", recorded=(0, 1, 2))], tmp_path / "nothing.ndjson")
    with pytest.raises(NothingToLearn, match="nothing to rehearse"):
        read_rehearsal(nothing, never)


def test_a_rehearsal_of_another_tokenizer_is_refused(base: Base, export: Path, other_game: Path, tmp_path: Path):
    document = json.loads(other_game.read_text().splitlines()[0])
    document["segments"][0]["token_ids"][0] = 48
    with pytest.raises(TrainingRefused, match="token id 48, but the base model has only 48 tokens"):
        train(options(), export, base, tmp_path / "out", rehearse=write([document], other_game))
