"""A whole run: the adapter moves the policy, runs are deterministic and continue, and nothing is left half written."""

import contextlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from service.engine.adapters import adopt, base_shapes
from service.learning import TrainingInterrupted, TrainingRefused, adapter
from service.learning.likelihood import collate, token_logprobs
from service.learning.options import Method, Options
from service.learning.partial import CHECKPOINT, RUN, partial_folder, working_folder
from service.learning.run import Base, Silent, train
from service.learning.trainer import Progress
from service.learning.trajectories import read
from tests.support.trajectories import ACTIONS, Player, load_model, make_model, write

FILES = {adapter.CONFIG, adapter.WEIGHTS, adapter.CARD}


class Recorder(Silent):
    """Keeps what happened. `stop_after`: asks to stop after this step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.steps: list[Progress] = []
        self.warnings: list[str] = []
        self.phases: list[str] = []
        self.stop_after = stop_after

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def step(self, progress: Progress) -> None:
        self.steps.append(progress)

    def should_stop(self) -> bool:
        return bool(self.stop_after) and len(self.steps) >= self.stop_after


@pytest.fixture
def base(tiny: Path) -> Base:
    return Base(str(tiny), "tiny")


def options(method: Method = "grpo", **changed: Any) -> Options:
    return Options(method, **{"learning_rate": 0.02, "epochs": 4, "batch_size": 8, "warmup_steps": 2, **changed})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def chance_of_first(model: Any, export: Path) -> float:
    """The mean probability of the first action at the places where an action was drawn, among all actions."""
    rows = [row for episode in read(export).episodes for row in episode.rows]
    for row in rows:
        row.token_ids[row.positions] = ACTIONS[0]
    with torch.no_grad():
        return float(token_logprobs(model, collate(rows)).exp().mean())


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("bc", {"keep": ("top:0.25",)}),
        ("bc", {"keep": ("rated",)}),
        ("dpo", {"beta": 0.5}),
        ("dpo", {"score": "rating"}),
        ("grpo", {}),
        ("grpo", {"kl": 0.05}),
    ],
)
def test_the_adapter_makes_the_better_action_likelier(
    method: Method, changed: dict[str, Any], base: Base, export: Path, tiny: Path, tmp_path: Path
):
    watcher = Recorder()
    card = train(options(method, **changed), export, base, tmp_path / "out", watcher=watcher)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    plain = load_model(tiny)
    before = chance_of_first(plain, export)
    after = chance_of_first(PeftModel.from_pretrained(plain, tmp_path / "out").get_base_model(), export)
    assert after > before + 0.02
    assert card["metrics"]["start"]["mean_abs_delta_logprob"] < 1e-4
    assert watcher.steps[0].figures["ratio"] == pytest.approx(1, abs=1e-4)
    assert watcher.steps[-1].step == card["metrics"]["steps"] == watcher.steps[-1].num_steps
    assert not partial_folder(tmp_path / "out").exists()


def test_the_service_accepts_the_adapter_and_gives_it_the_version_of_the_card(
    base: Base, export: Path, tiny: Path, tiny_version: str, tmp_path: Path
):
    card = train(options(epochs=1), export, base, tmp_path / "out")
    found = adopt(tmp_path / "out", tmp_path / "kept", base=base_shapes(tiny), max_rank=8)
    assert found.rank == 8
    version = adapter.version_of(adapter.read_files(tmp_path / "out"), tiny_version)
    assert version == card["policy_version"]
    assert adapter.digest(adapter.read_files(tmp_path / "out")) == found.digest
    config = json.loads((tmp_path / "out" / adapter.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert str(tmp_path) not in json.dumps(config)


def test_the_card_says_what_was_trained(base: Base, export: Path, tiny_version: str, tmp_path: Path):
    train(options(seed=3), export, base, tmp_path / "out", where={"env": "Tokens-v0"})
    card = json.loads((tmp_path / "out" / adapter.CARD).read_text())
    data = read(export)
    assert card["base"] == {"model": "tiny", "policy_version": tiny_version}
    assert card["data"]["digest"] == f"sha256:{data.digest}"
    assert card["data"]["filters"] == {"env": "Tokens-v0"}
    assert card["data"]["episodes"] == 24
    assert card["data"]["trained_tokens"] == card["data"]["steps"] == 4 * card["data"]["episodes_used"]
    assert card["data"]["token_kinds"] == {"ids": 1.0}
    assert (card["method"], card["options"]["seed"]) == ("grpo", 3)
    assert len(card["metrics"]["epochs"]) == 4
    assert {"loss", "ratio", "ratio_max", "kl", "clipped", "advantage"} <= set(card["metrics"]["epochs"][0])
    assert card["packages"]["torch"] == torch.__version__


def test_same_data_and_seed_give_the_same_bytes(base: Base, export: Path, tmp_path: Path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(options(seed=seed), export, base, tmp_path / name)
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert (one[adapter.WEIGHTS], one[adapter.CONFIG]) == (two[adapter.WEIGHTS], two[adapter.CONFIG])
    assert one[adapter.WEIGHTS] != other[adapter.WEIGHTS]


def test_parts_of_a_batch_give_the_same_result_as_the_whole(base: Base, export: Path, tmp_path: Path):
    found = []
    for name, max_batch_tokens in (("whole", 4096), ("parts", 1)):
        train(options("dpo", epochs=1, max_batch_tokens=max_batch_tokens), export, base, tmp_path / name)
        found.append(adapter.load_adapter(load_model(Path(base.path)), tmp_path / name, "tiny"))
    whole, parts = (adapter.weights_of(model) for model in found)
    assert all(torch.allclose(whole[name], parts[name], atol=2e-3) for name in whole)


@pytest.mark.parametrize("method", ["bc", "dpo", "grpo"])
def test_a_run_that_was_stopped_continues_as_if_it_had_not_been(
    method: Method, base: Base, export: Path, tmp_path: Path
):
    chosen = options(method, kl=0.1 if method == "grpo" else 0.0)
    train(chosen, export, base, tmp_path / "unbroken")
    stopped = Recorder(stop_after=4)  # in the middle of an epoch
    with pytest.raises(TrainingInterrupted):
        train(chosen, export, base, tmp_path / "out", watcher=stopped, should_stop=stopped.should_stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(TrainingRefused, match=r"an unfinished run is in .*--resume"):
        train(chosen, export, base, tmp_path / "out")
    card = train(chosen, export, base, tmp_path / "out", resume=True)
    assert files(tmp_path / "out")[adapter.WEIGHTS] == files(tmp_path / "unbroken")[adapter.WEIGHTS]
    unbroken = json.loads((tmp_path / "unbroken" / adapter.CARD).read_text())
    assert card["metrics"]["epochs"] == unbroken["metrics"]["epochs"]


def test_a_run_continues_only_with_the_same_options_and_data(base: Base, export: Path, player: Player, tmp_path: Path):
    stopped = Recorder(stop_after=1)
    with pytest.raises(TrainingInterrupted):
        train(options(), export, base, tmp_path / "out", watcher=stopped, should_stop=stopped.should_stop)
    with pytest.raises(TrainingRefused, match=r"started with something else: epochs \(4, now 5\)"):
        train(options(epochs=5), export, base, tmp_path / "out", resume=True)
    with export.open("a") as file:
        file.write(json.dumps(player.play("one more")) + "\n")
    with pytest.raises(TrainingRefused, match="something else: data"):
        train(options(), export, base, tmp_path / "out", resume=True)
    (partial_folder(tmp_path / "out") / CHECKPOINT).write_bytes(b"damaged")
    export.write_bytes(b"".join(export.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(TrainingRefused, match=r"the checkpoint .* cannot be used"):
        train(options(), export, base, tmp_path / "out", resume=True)


def test_an_export_from_a_service_is_kept_for_a_run_that_continues(base: Base, export: Path, tmp_path: Path):
    calls: list[int] = []

    def documents() -> Iterator[Any]:
        calls.append(1)
        yield from map(json.loads, export.read_text().splitlines())

    train(options(), export, base, tmp_path / "unbroken")
    stopped = Recorder(stop_after=1)
    with pytest.raises(TrainingInterrupted):
        train(options(), documents, base, tmp_path / "out", watcher=stopped, should_stop=stopped.should_stop)
    train(options(), documents, base, tmp_path / "out", resume=True)
    assert len(calls) == 1
    assert files(tmp_path / "out")[adapter.WEIGHTS] == files(tmp_path / "unbroken")[adapter.WEIGHTS]


def test_a_complete_run_is_not_repeated(base: Base, export: Path, tmp_path: Path):
    card = train(options(), export, base, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(TrainingRefused, match="exists already"):
        train(options(), export, base, tmp_path / "out")
    assert train(options(), export, base, tmp_path / "out", resume=True) == card
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"method": "bc"}, r"method \('grpo', now 'bc'\)"),
        ({"seed": 5}, r"seed \(0, now 5\)"),
        ({"where": {"env": "Tokens-v0"}}, "filters"),
        ({"name": "other"}, r"base model \('tiny', now 'other'\)"),
        ({"data": "less"}, "data"),
    ],
)
def test_a_complete_run_is_not_taken_for_another_one(
    changed: dict[str, Any], words: str, complete: Path, base: Base, export: Path, tmp_path: Path
):
    before = files(complete)
    if changed.get("data"):
        export.write_bytes(b"".join(export.read_bytes().splitlines(keepends=True)[:-1]))
    chosen = options(changed.get("method", "grpo"), epochs=1, seed=changed.get("seed", 0))
    other = replace(base, name=changed.get("name", "tiny"))
    with pytest.raises(TrainingRefused, match=f"is complete, but was trained with something else: {words}"):
        train(chosen, export, other, complete, where=changed.get("where"), resume=True)
    assert files(complete) == before


@pytest.fixture(scope="module")
def complete(tiny: Path, lessons: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a complete adapter."""
    folder = tmp_path_factory.mktemp("complete")
    train(options(epochs=1), write(lessons, folder / "export.ndjson"), Base(str(tiny), "tiny"), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"options": 1}'])
def test_a_damaged_card_is_reported(content: str, base: Base, export: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / adapter.CARD).write_text(content)
    with pytest.raises(TrainingRefused, match=r"episodic_adapter\.json is damaged .* Remove .*out to train again"):
        train(options(), export, base, tmp_path / "out", resume=True)


def test_a_run_that_diverges_can_be_started_again(base: Base, export: Path, tmp_path: Path):
    with pytest.raises(TrainingRefused, match=r"step \d+ is not finite\. Nothing of this training was kept"):
        train(options(learning_rate=1e30), export, base, tmp_path / "out", checkpoint_every=1)
    assert not partial_folder(tmp_path / "out").exists()


def test_files_of_others_stay(base: Base, export: Path, tmp_path: Path):
    work = partial_folder(tmp_path / "out")
    work.mkdir()
    (work / "notes").write_text("mine")
    with pytest.raises(TrainingRefused, match="an unfinished run is in"):
        train(options(epochs=1), export, base, tmp_path / "out")
    with pytest.raises(TrainingRefused, match="cannot be loaded"):
        train(options(epochs=1), export, Base(str(tmp_path), "none"), tmp_path / "out", resume=True)
    train(options(epochs=1), export, base, tmp_path / "out", resume=True)
    assert files(work) == {"notes": b"mine"}


def test_one_process_for_each_folder(base: Base, export: Path, tmp_path: Path):
    with working_folder(tmp_path / "out", resume=False) as work:
        (work / CHECKPOINT).write_bytes(b"of the other process")
        with pytest.raises(TrainingRefused, match="another process is training in"):
            train(options(), export, base, tmp_path / "out", resume=True)
        assert (work / CHECKPOINT).read_bytes() == b"of the other process"


def test_an_unfinished_run_whose_description_is_damaged(base: Base, export: Path, tmp_path: Path):
    work = partial_folder(tmp_path / "out")
    work.mkdir()
    (work / CHECKPOINT).write_bytes(b"")
    (work / RUN).write_text("[1]")
    with pytest.raises(TrainingRefused, match=r"run\.json is damaged, .* Remove .*out\.partial"):
        train(options(), export, base, tmp_path / "out", resume=True)


def test_an_adapter_keeps_its_rank(complete: Path, base: Base, export: Path, tmp_path: Path):
    goes_on = replace(base, adapter=complete)
    with pytest.raises(TrainingRefused, match="has rank 8 and alpha 16, and keeps them"):
        train(options(rank=4, any_version=True), export, goes_on, tmp_path / "out")
    config = complete / adapter.CONFIG
    copied = tmp_path / "copied"
    shutil.copytree(complete, copied)
    (copied / adapter.CONFIG).write_text(config.read_text().replace('"lora_alpha": 16', '"lora_alpha": 32'))
    card = train(options(epochs=1, any_version=True), export, replace(base, adapter=copied), tmp_path / "out")
    assert (card["options"]["rank"], card["options"]["alpha"]) == (8, 32)


def test_training_goes_on_from_an_adapter(base: Base, export: Path, player: Player, tiny: Path, tmp_path: Path):
    first = train(options(), export, base, tmp_path / "first")
    with pytest.raises(TrainingRefused, match="another base model or policy version"):
        train(options(), export, Base(str(tiny), "tiny", adapter=tmp_path / "first"), tmp_path / "second")
    player.model = PeftModel.from_pretrained(load_model(tiny), tmp_path / "first").get_base_model()
    player.version = first["policy_version"]
    again = write([player.play(f"e{number}", num_steps=4) for number in range(24)], tmp_path / "again.ndjson")
    watcher = Recorder()
    goes_on = Base(str(tiny), "tiny", adapter=tmp_path / "first")
    card = train(options(epochs=1), again, goes_on, tmp_path / "second", watcher=watcher)
    assert card["initial_policy_version"] == first["policy_version"] != card["policy_version"]
    assert watcher.steps[0].figures["ratio"] == pytest.approx(1, abs=1e-4)
    trained = PeftModel.from_pretrained(load_model(tiny), tmp_path / "second").get_base_model()
    assert chance_of_first(trained, export) > chance_of_first(player.model, export)


def test_the_reference_is_the_base_or_the_initial_adapter(base: Base, export: Path, tiny: Path, tmp_path: Path):
    train(options(), export, base, tmp_path / "first")
    margins = {}
    for reference in ("base", "initial"):
        watcher = Recorder()
        chosen = options("dpo", reference=reference, any_version=True, epochs=1)
        goes_on = Base(str(tiny), "tiny", adapter=tmp_path / "first")
        train(chosen, export, goes_on, tmp_path / reference, watcher=watcher)
        margins[reference] = watcher.steps[0].figures["pair_margin"]
    assert abs(margins["initial"]) < 1e-4
    assert margins["base"] > 0.1


def test_data_of_another_policy_is_refused_unless_it_is_accepted(
    base: Base, export: Path, tiny_version: str, tmp_path: Path
):
    other = Base(str(make_model(tmp_path / "other", seed=1)), "other")
    with pytest.raises(TrainingRefused) as refused:
        train(options(), export, other, tmp_path / "out")
    assert tiny_version in str(refused.value)
    assert "--any-version" in str(refused.value)
    watcher = Recorder()
    card = train(options(any_version=True, epochs=1), export, other, tmp_path / "out", watcher=watcher)
    assert any("the policy versions that acted are" in warning for warning in watcher.warnings)
    assert any("differ from those of the initial policy" in warning for warning in watcher.warnings)
    assert card["metrics"]["start"]["mean_abs_delta_logprob"] > 0.05


@pytest.mark.parametrize(("place", "token"), [("token_ids", 48), ("support", 99)])
def test_tokens_of_another_tokenizer_are_refused(place: str, token: int, base: Base, player: Player, tmp_path: Path):
    documents = [player.play(f"e{number}") for number in range(8)]
    for document in documents:
        (segment,) = document["segments"]
        if place == "token_ids":
            segment["token_ids"][0] = token
        else:
            next(filter(None, segment["support"]))["ids"].append(token)
    with pytest.raises(TrainingRefused, match=f"token id {token}, but the base model has only 48 tokens"):
        train(options(), write(documents, tmp_path / "e.ndjson"), base, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"e.ndjson"}


def test_a_model_that_cannot_be_loaded(export: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingRefused, match=r"the base model .*empty cannot be loaded"):
        train(options(), export, Base(str(tmp_path / "empty"), "empty"), tmp_path / "out")
    assert not partial_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [lambda data: data[:-10], lambda data: data[:5], lambda data: b"x" * 100, bytes])
def test_damaged_weights_are_refused(
    damage: Callable[[bytes], bytes], base: Base, export: Path, tiny: Path, tmp_path: Path
):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    spoil(damaged / "model.safetensors", damage)
    with pytest.raises(TrainingRefused, match=r"the base model .*damaged cannot be loaded: its weights are damaged"):
        train(options(), export, Base(str(damaged), "tiny"), tmp_path / "out")
    model = adapter.load_base(base.path, options(), torch.device("cpu"))
    adapter.write_folder(tmp_path / "adapter", adapter.files_of(adapter.new_adapter(model, options(), "tiny")))
    spoil(tmp_path / "adapter" / adapter.WEIGHTS, damage)
    goes_on = Base(base.path, "tiny", adapter=tmp_path / "adapter")
    with pytest.raises(TrainingRefused, match=r"the weights of the adapter .*adapter are damaged"):
        train(options(any_version=True), export, goes_on, tmp_path / "out")


def spoil(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()) if damage is not bytes else b"")


@contextlib.contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """Makes writes beyond this size of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def sizes(base: Base, export: Path, tmp_path: Path) -> tuple[int, int]:
    """The sizes of an adapter's weights, and of a checkpoint."""
    stopped = Recorder(stop_after=1)
    with pytest.raises(TrainingInterrupted):
        train(options(), export, base, tmp_path / "sizes", watcher=stopped, should_stop=stopped.should_stop)
    checkpoint = (partial_folder(tmp_path / "sizes") / CHECKPOINT).stat().st_size
    train(options(), export, base, tmp_path / "sizes", resume=True)
    return (tmp_path / "sizes" / adapter.WEIGHTS).stat().st_size, checkpoint


def test_a_full_disk_leaves_nothing_half_written(base: Base, export: Path, tmp_path: Path):
    weights, checkpoint = sizes(base, export, tmp_path)
    expected = files(tmp_path / "sizes")[adapter.WEIGHTS]
    before = {path.name for path in tmp_path.iterdir()}
    assert weights < checkpoint
    with file_limit(checkpoint // 2), pytest.raises(TrainingRefused, match=r"File too large. No incomplete file"):
        train(options(), export, base, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == before

    def fills_up(progress: Progress) -> None:
        if progress.step == progress.num_steps - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (weights // 2, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    watcher = Recorder()
    watcher.step = fills_up  # type: ignore[method-assign]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(TrainingRefused, match="has the last checkpoint: continue with --resume"):
            train(options(), export, base, tmp_path / "out", watcher=watcher)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.glob("*/*.partial")] == []
    train(options(), export, base, tmp_path / "out", resume=True)
    assert files(tmp_path / "out")[adapter.WEIGHTS] == expected


def test_without_peft_the_extra_is_named(base: Base, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(TrainingRefused, match=r"pip install 'episodic\[train\]'"):
        train(options(), export, base, tmp_path / "out")
