"""`episodic train`: what it prints, its exit codes, and a process that is stopped and killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from service.cli.main import app
from service.learning import adapter
from service.learning.options import USED_BY


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPISODIC_DATA", str(tmp_path / "data"))


def test_what_it_prints(export: Path, tiny: Path, tmp_path: Path):
    arguments = ("--method", "grpo", "--from", export, "--model", tiny, "--epochs", "2", "--env", "Tokens-v0")
    done = run(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "of 24 episodes, mean return" in done.stderr
    assert "(100.0% ids)" in done.stderr
    assert "step 2 of 2: loss " in done.stderr
    card = json.loads((tmp_path / "out" / adapter.CARD).read_text())
    assert f"Wrote version {card['policy_version']}" in done.stdout
    assert '-d \'{"path": "out"}\'' in done.stdout
    again = run(*arguments, "--out", tmp_path / "out", "--resume")
    assert f"already complete: it has version {card['policy_version']}" in again.stdout
    printed = json.loads(run(*arguments, "--out", tmp_path / "out2", "--json").stdout)
    assert printed["policy_version"] == card["policy_version"]
    assert printed["data"]["filters"] == {"env": "Tokens-v0"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "ppo"), "'ppo' is not one of 'bc', 'dpo', 'grpo'"),
        (("--method", "bc", "--keep", "best"), "'best' is none of success"),
        (("--method", "bc", "--keep", "top:2"), "'top:2' is none of success"),
        (("--method", "bc", "--epochs", "0"), "should be greater than or equal to 1"),
        (("--method", "bc", "--learning-rate", "inf"), "should be less than or equal to 1"),
        (("--method", "bc", "--learning-rate", "nan"), "'--learning-rate'"),
        (("--method", "bc", "--seed", str(2**70)), "'--seed'"),
        (("--method", "grpo", "--max-ratio", "inf"), "must be a finite number"),
        (("--method", "dpo", "--beta", "nan"), "'--beta'"),
        (("--method", "bc", "--since", "yesterday"), "'yesterday' is not a point in time"),
        (("--method", "bc", "--init-adapter", "nowhere"), "'nowhere' does not exist"),
        (("--method", "bc", "--clip", "0.2"), "--clip belongs to --method grpo, but the method is bc"),
        (("--method", "bc", "--reference", "base"), "--reference belongs to --method dpo and grpo"),
        (("--method", "dpo", "--keep", "success", "--kl", "0"), "--keep belongs to --method bc, --kl belongs to"),
        (("--method", "dpo", "--allow-filtered", "--max-ratio", "3"), "--max-ratio belongs to --method grpo, --allow"),
        (("--method", "grpo", "--beta=0.1", "--score", "return"), "--score belongs to --method dpo, --beta belongs to"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], words: str, export: Path, tmp_path: Path):
    refused = run(*arguments, "--from", export, "--out", tmp_path / "out")
    assert refused.exit_code == 2
    assert words in " ".join(refused.stderr.replace("│", " ").split())


def test_each_option_of_a_method_is_an_option_of_the_command():
    declared = {option for parameter in get_command(app).commands["train"].params for option in parameter.opts}
    assert set(USED_BY) <= declared


def test_a_refusal_is_one_line_and_leaves_nothing(export: Path, tiny: Path, tmp_path: Path):
    active = tmp_path / "active.ndjson"
    active.write_text(export.read_text().replace('"status": "ended"', '"status": "active"'))
    before = {path.name for path in tmp_path.iterdir()}
    for arguments, words in [
        (("bc", "--from", active, "--model", tiny), "matches the filters {'status': 'ended'}"),
        (("bc", "--from", tmp_path / "absent", "--model", tiny), "absent cannot be read"),
        (("bc", "--from", export, "--model", tiny, "--success", "--tag", "x"), "matches the filters"),
        (("bc", "--from", export, "--model", tiny, "--keep", "recorded"), "nothing to imitate"),
        (("grpo", "--from", export), "is of another base model or policy version"),
        (("bc", "--from", "http://127.0.0.1:9", "--model", tiny), "no service answers at http://127.0.0.1:9"),
    ]:
        refused = run("--method", *arguments, "--out", tmp_path / "out")
        assert words in refused.stderr, refused.output
        assert refused.exit_code == (3 if "nothing to imitate" in words else 1)
        assert refused.stderr.splitlines()[-1].startswith("Error: ")
    assert {path.name for path in tmp_path.iterdir()} - {"data"} == before


def test_a_refused_training_leaves_no_folder(export: Path, tiny: Path, tmp_path: Path):
    arguments = ("--method", "bc", "--from", export, "--model", tiny, "--keep", "recorded")
    assert run(*arguments, "--out", tmp_path / "a" / "b" / "c").exit_code == 3
    assert not (tmp_path / "a").exists()
    too_long = run(*arguments, "--out", tmp_path / ("x" * 300))
    assert too_long.exit_code == 1
    assert "File name too long" in too_long.stderr


class Process:
    """`episodic train` as a process of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "service", "train", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_for(self, is_true: Any) -> None:
        deadline = time.monotonic() + 120
        while not is_true():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self, number: int) -> tuple[int, str]:
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


def test_a_process_that_is_stopped_and_killed_continues_as_if_it_had_not_been(export: Path, tiny: Path, tmp_path: Path):
    arguments = ("--method", "grpo", "--from", export, "--model", tiny, "--epochs", "80", "--checkpoint-every", "1")
    out, checkpoint = tmp_path / "out", tmp_path / "out.partial" / "checkpoint.pt"
    stopped = Process(*arguments, "--out", out)
    stopped.wait_for(checkpoint.exists)
    code, output = stopped.end(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM. A checkpoint is in" in output
    assert f"--out {out} --resume" in output
    left = checkpoint.stat().st_mtime_ns
    killed = Process(*arguments, "--out", out, "--resume")
    killed.wait_for(lambda: checkpoint.stat().st_mtime_ns != left)
    assert killed.end(signal.SIGKILL)[0] == -signal.SIGKILL
    assert not out.exists()
    finished = run(*arguments, "--out", out, "--resume")
    assert finished.exit_code == 0, finished.output
    assert "continuing after step" in finished.stderr
    assert run(*arguments, "--out", tmp_path / "unbroken").exit_code == 0
    first, second = (folder / adapter.WEIGHTS for folder in (out, tmp_path / "unbroken"))
    assert first.read_bytes() == second.read_bytes()


def test_other_commands_load_neither_torch_nor_peft():
    script = "import sys, service.cli.main; print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed == "[]\n"
