"""The learning loop, with a scripted service and a trainer whose results are given."""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.learning.options import LEARNING_RATES
from service.loop import LearningFailed, report, state
from service.loop.plan import Plan
from service.loop.playing import Outcome, Service, compare
from service.loop.rounds import learn
from tests.client.fake_service import drop_after, overloaded, serve
from tests.learning.lesson import ENV, TRAIN
from tests.learning.loop_service import BASE, LoopService

PLAN = Plan(ENV, "pupil", rounds=3, seeds=2, repeat=2, selection=40, final=50)


@dataclass
class Improved:
    """A run whose second candidate is worse."""

    fake: LoopService
    out: Path
    found: Any

    def version(self, number: int) -> str:
        return self.found["rounds"][number - 1]["load"]["version"]


@pytest.fixture(scope="module")
def improved(tmp_path_factory: pytest.TempPathFactory) -> Improved:
    fake, out = LoopService(), tmp_path_factory.mktemp("improved") / "out"
    with serve(fake) as url:
        return Improved(fake, out, run(url, out, [0.8, 0.3, 1.0]))


@pytest.fixture
def fake() -> LoopService:
    return LoopService()


@pytest.fixture
def url(fake: LoopService) -> Iterator[str]:
    with serve(fake) as served:
        yield served


def run(url: str, out: Path, skills: list[Any], plan: Plan = PLAN) -> Any:
    out.mkdir(exist_ok=True)
    (out / "SKILLS").write_text(json.dumps(skills))
    return learn(plan, Service(url, retry_s=5.0), out, train_command=TRAIN)


def verdicts(found: Any) -> list[Any]:
    return [played.get("select", {}).get("verdict") for played in found["rounds"]]


def test_the_alias_moves_only_to_better_versions(improved: Improved):
    assert verdicts(improved.found) == ["better", "worse", "better"]
    assert improved.fake.aliases == {"pupil": improved.version(3)}
    moved = [one["version"] for one in improved.fake.loads if one["alias"] in (True, "true")]
    assert moved == [improved.version(1), improved.version(3)]
    assert (improved.found["best"]["policy"], improved.found["best"]["round"]) == (improved.version(3), 3)


def test_lineage(improved: Improved):
    uploads = [one for one in improved.fake.loads if "evaluation" not in one]
    first = improved.version(1)
    assert [(one.get("parent"), one["round"]) for one in uploads] == [(None, "1"), (first, "2"), (first, "3")]
    assert [one["alias"] for one in uploads] == ["false"] * 3
    stored = [one["evaluation"]["verdict"] for one in improved.fake.loads if "evaluation" in one]
    assert stored == ["better", "worse", "better"]


def test_a_round_starts_from_the_last_candidate_that_was_not_worse(improved: Improved):
    first, out = improved.version(1), improved.out
    assert [played["rollout"]["policy"] for played in improved.found["rounds"]] == [BASE, first, first]
    calls = [json.loads((out / f"round-{number}" / "calls").read_text()) for number in (1, 2, 3)]
    assert "--init-adapter" not in calls[0]
    best = str(out / "round-1" / "adapter")
    assert [call[call.index("--init-adapter") + 1] for call in calls[1:]] == [best, best]
    assert [call[call.index("--seed") + 1] for call in calls] == ["1", "2", "3"]


def test_a_tied_candidate_is_trained_further_and_a_worse_one_is_not(url: str, tmp_path: Path):
    """All are compared with the best policy, which is the base model until a candidate is better."""
    out = tmp_path / "out"
    found = run(url, out, [0.5, 0.0, 1.0], replace(PLAN, patience=3))
    assert verdicts(found) == ["tied", "worse", "better"]
    first, _, third = [played["load"]["version"] for played in found["rounds"]]
    assert [played["rollout"]["policy"] for played in found["rounds"]] == [BASE, first, first]
    assert [played["select"]["policies"][1] for played in found["rounds"]] == [BASE] * 3
    calls = [json.loads((out / f"round-{number}" / "calls").read_text()) for number in (2, 3)]
    assert [call[call.index("--init-adapter") + 1] for call in calls] == [str(out / "round-1" / "adapter")] * 2
    assert found["best"]["policy"] == third


def test_the_final_test_compares_the_best_with_the_base_on_other_seeds(improved: Improved):
    final, fake = improved.found["final"], improved.fake
    assert final["policies"] == [improved.version(3), BASE]
    assert (final["verdict"], final["pairs"], final["candidate"]["value"]) == ("better", 50, 1.0)
    assert final["delta"] == pytest.approx(1 - final["baseline"]["value"])
    assert len(fake.tagged("final")) == 2 * 50
    played = {e.fields["metadata"]["seed"] for e in fake.tagged("final")}
    others = {e.fields["metadata"]["seed"] for e in fake.episodes.values() if "final" not in e.fields["tags"]}
    assert played == set(PLAN.final_seeds)
    assert not others & played


def test_seeds_are_disjoint_and_written_down(improved: Improved):
    assert json.loads((improved.out / state.STATE).read_text())["seeds"]["training"] == [0, 6]
    labels = [*(f"round-{n}" for n in (1, 2, 3)), *(f"selection-{n}" for n in (1, 2, 3)), "final"]
    tagged = [improved.fake.tagged(label) for label in labels]
    seeds = [{e.fields["metadata"]["seed"] for e in episodes} for episodes in tagged]
    assert [len(one) for one in seeds] == [2, 2, 2, 40, 40, 40, 50]
    assert all(not one & other for one, other in itertools.combinations(seeds, 2))
    temperatures = [{e.fields["sampling"]["temperature"] for e in episodes} for episodes in tagged]
    assert temperatures == [{1.0}] * 3 + [{0.0}] * 4


def test_the_plot_and_the_report(improved: Improved):
    assert (improved.out / report.PLOT).read_bytes().startswith(b"\x89PNG")
    assert json.loads((improved.out / report.REPORT).read_text()) == improved.found


def test_a_complete_run_returns_its_report_without_playing(improved: Improved):
    with serve(improved.fake) as url:
        count = len(improved.fake.received)
        assert run(url, improved.out, []) == improved.found
        assert len(improved.fake.received) == count
        with pytest.raises(LearningFailed, match="repeat was 2, now 3"):
            run(url, improved.out, [], replace(PLAN, repeat=3))


def test_tied_and_too_few(url: str, fake: LoopService, tmp_path: Path):
    found = run(url, tmp_path / "out", [0.5, 0.5, 1.0])
    assert verdicts(found) == ["tied", "tied"]  # then its patience ends
    assert (found["final"], found["plot"] is None, fake.aliases) == (None, False, {})
    few = run(url, tmp_path / "few", [1.0], replace(PLAN, name="few", selection=5, rounds=1))
    assert verdicts(few) == ["too_few"]
    assert fake.aliases == {}


def test_the_temperature_and_the_learning_rate_of_the_rounds(url: str, fake: LoopService, tmp_path: Path):
    falling = replace(PLAN, patience=3, temperature=4.0, last_temperature=1.0)
    run(url, tmp_path / "out", [0.5, 0.5, 0.5], replace(falling, learning_rate=1e-3))
    played = [{e.fields["sampling"]["temperature"] for e in fake.tagged(f"round-{number}")} for number in (1, 2, 3)]
    assert played == [{4.0}, {2.0}, {1.0}]
    calls = [json.loads((tmp_path / "out" / f"round-{number}" / "calls").read_text()) for number in (1, 2, 3)]
    rates = [float(call[call.index("--learning-rate") + 1]) for call in calls]
    assert rates == pytest.approx([1e-3, 5e-4, 2.5e-4])
    assert falling.learning_rate_in(3) == pytest.approx(LEARNING_RATES["grpo"] / 4)
    assert replace(falling, temperature=0.0, last_temperature=None).learning_rate_in(3) == LEARNING_RATES["grpo"]
    plan = replace(PLAN, rounds=3, temperature=8.0, last_temperature=2.0)
    assert [plan.temperature_in(number) for number in (1, 2, 3)] == [8.0, 4.0, 2.0]
    assert replace(plan, last_temperature=None).temperature_in(3) == 8.0
    assert replace(plan, rounds=1).temperature_in(1) == 8.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selection_seed": 5}, r"training \(0 to 5\) and for selection \(5 to 124\) overlap"),
        ({"final_seed": 1_000_000_119}, "selection .* and for final .* overlap"),
        ({"final_seed": 0}, "training .* and for final .* overlap"),
        ({"final_seed": 2**31 - 10}, "must be below 2147483648"),
    ],
)
def test_overlapping_seeds_are_refused(changes: dict[str, int], words: str, tmp_path: Path):
    with pytest.raises(LearningFailed, match=words):
        learn(replace(PLAN, **changes), Service("http://127.0.0.1:9"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_round_with_nothing_to_learn_counts_against_patience(url: str, fake: LoopService, tmp_path: Path):
    found = run(url, tmp_path / "out", ["all returns are equal", 0.9, 0.1])
    assert found["rounds"][0]["train"] == {"refused": "all returns are equal"}
    assert verdicts(found) == [None, "better", "worse"]
    found = run(url, tmp_path / "none", ["no successes", "no successes"], replace(PLAN, name="none"))
    assert (verdicts(found), found["plot"], found["final"]) == ([None, None], None, None)


def test_a_training_that_fails_ends_the_run(url: str, fake: LoopService, tmp_path: Path):
    with pytest.raises(LearningFailed, match=r"ended with code 1: Error: broken disk. Its log is .*train\.log"):
        run(url, tmp_path / "out", ["broken disk"])
    framed = "Usage: broken\n╭─ Error ────╮\n│ --epochs:  │\n│ 'x' is no  │\n│ number.    │\n╰────────────╯"
    with pytest.raises(LearningFailed, match=r"ended with code 1: --epochs: 'x' is no number\. Its log is"):
        run(url, tmp_path / "framed", [framed])
    with pytest.raises(LearningFailed, match=r"ended with code 1: Error: broken model: no such file\. Its log is"):
        run(url, tmp_path / "long", ["broken model:\nno such file."])
    fake.base_version = "base-2"
    with pytest.raises(LearningFailed, match=r"began with the base model scripted \(base-1\), but .* \(base-2\)"):
        run(url, tmp_path / "out", [1.0])


def test_missing_rights_are_reported_before_the_first_rollout(url: str, fake: LoopService, tmp_path: Path):
    fake.scopes = {"act", "read"}
    with pytest.raises(LearningFailed, match="lacks the scope admin"):
        run(url, tmp_path / "out", [1.0])
    fake.scopes, fake.has_adapters = {"admin"}, False
    with pytest.raises(LearningFailed, match="cannot load adapters"):
        run(url, tmp_path / "out", [1.0])
    fake.has_adapters, fake.aliases = True, {"pupil": "pupil@1"}
    with pytest.raises(LearningFailed, match="has a policy 'pupil' already"):
        run(url, tmp_path / "out", [1.0])
    assert not fake.episodes


def test_calls_are_retried_while_the_service_is_gone(url: str, fake: LoopService, tmp_path: Path):
    fake.script("/act/batch", drop_after, overloaded())
    fake.script("/export", overloaded(), drop_after)
    fake.script("/policy/pupil", overloaded(), overloaded(), drop_after)
    fake.script("/policy", drop_after)
    assert verdicts(run(url, tmp_path / "out", [1.0], replace(PLAN, rounds=1))) == ["better"]


def test_one_process_for_each_folder(url: str, tmp_path: Path):
    with state.locked(tmp_path / "out"), pytest.raises(LearningFailed, match="another process is learning"):
        run(url, tmp_path / "out", [1.0])


def test_compare():
    right = [Outcome(seed, True, 1.0) for seed in range(20)]
    wrong = [Outcome(seed, False, 0.0) for seed in range(5, 30)]
    compared = compare(right, wrong, "auto")
    assert (compared["metric"], compared["pairs"], compared["delta"]) == ("completion", 15, 1.0)
    unknown = [replace(one, success=None) for one in wrong]
    assert compare(right, unknown, "auto")["metric"] == "return"
    with pytest.raises(LearningFailed, match="--success-at"):
        compare(right, unknown, "completion")
    assert compare([], wrong, "auto")["verdict"] == "too_few"


def command(url: str, out: Path, *arguments: str) -> Any:
    numbers = ("--rounds", "1", "--episodes", "2", "--repeat", "2", "--selection", "40", "--final", "50")
    return CliRunner().invoke(app, ["learn", "--env", ENV, "--out", str(out), "--url", url, *numbers, *arguments])


def test_what_the_command_prints(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("service.loop.rounds.learn.__kwdefaults__", {**learn.__kwdefaults__, "train_command": TRAIN})
    out = tmp_path / "pupil"
    out.mkdir()
    (out / "SKILLS").write_text("[1.0]")
    done = command(url, out)
    assert done.exit_code == 0, done.output
    assert "Seeds for final: 2000000000 to 2000000049" in done.stderr
    assert "round 1: select: 80 of 80 episodes" in done.stderr
    assert "| better | -> pupil@" in done.stderr
    assert "Final test: completion 1.000 [0.929, 1.000] against 0." in done.stdout
    assert "on 50 seeds used for nothing else: +0." in done.stdout
    printed = json.loads(command(url, out, "--json").stdout)
    assert printed["final"]["verdict"] == "better"


def test_without_peft_nothing_is_played(url: str, fake: LoopService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    refused = command(url, tmp_path / "out")
    assert (refused.exit_code, fake.received) == (1, [])
    assert "pip install 'episodic[train]'" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--train-args", "--out x"), 2, "--out is set by this command"),
        (("--train-args", "--learning-rate=1"), 2, "--learning-rate is set by this command"),
        (("--train-args", "--help"), 2, "use `episodic train --help`"),
        (("--train-args", "--epochs 0"), 2, "Invalid value for --train-args: Invalid value for '--epochs'"),
        (("--train-args", "--epochz 2"), 2, "No such option: --epochz"),
        (("--train-args", "--epochs"), 2, "requires an argument"),
        (("--train-args", "2"), 2, "unexpected extra argument"),
        (("--train-args", "--since yesterday"), 2, "'yesterday' is not a point in time"),
        (("--train-args", "--metadata x"), 2, "expected KEY=VALUE"),
        (("--selection", "9"), 2, "greater than or equal to 10"),
        (("--final", "9"), 2, "greater than or equal to 10"),
        (("--temperature", "inf"), 2, "must be a finite number"),
        (("--learning-rate", "2"), 2, "less than or equal to 1"),
        (("--success-at", "nan"), 2, "must be a finite number"),
        (("--train-args", "--tag x --beta=1"), 2, "--beta belongs to --method dpo, but the method is grpo"),
        (("--env-kwargs", "[]"), 2, "expected a JSON object"),
        (("--temperature", "0", "--last-temperature", "2"), 2, "needs a --temperature above 0"),
        (("--final-seed", "0"), 1, "overlap"),
        (("--url", "http://127.0.0.1:9", "--retry-s", "0"), 1, "no service answers at http://127.0.0.1:9"),
    ],
)
def test_refusals_of_the_command(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path):
    refused = command("http://127.0.0.1:9", tmp_path / "out", *arguments)
    assert refused.exit_code == code
    assert words in " ".join(refused.stderr.replace("│", " ").split())
