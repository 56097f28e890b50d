"""`episodic rollout --policies`: several policies play the same seeds, and are compared."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from service.cli.main import app
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine
from tests.support.adapters import make_adapter
from tests.support.serving import Served, serve


@pytest.fixture
async def api(tmp_path: Path, tokenizer: HFTokenizer) -> AsyncIterator[Served]:
    engine = ScriptedEngine(tokenizer)
    engine.info = dataclasses.replace(engine.info, max_lora_rank=8)
    make_adapter(tmp_path / "adapters" / "one", 1)
    async with serve(tmp_path, engine, adapters=tmp_path / "adapters") as served:
        loaded = await served.client.put("/policy/walker", json={"path": "one"})
        assert loaded.status_code == 201, loaded.text
        yield served


async def run(api: Served, *arguments: str) -> Any:
    command = ["rollout", "--env", "Blackjack-v1", "--url", api.url, *arguments]
    return await asyncio.to_thread(CliRunner().invoke, app, command, env={"COLUMNS": "200"})


async def test_policies_play_the_same_seeds_and_are_compared(api: Served):
    ran = await run(api, "--policies", "base,walker", "--episodes", "12", "--seed", "3", "--json")
    assert ran.exit_code == 0, ran.stderr
    report = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith("{")))  # the service logs, too
    assert [*report["policies"]] == ["scripted", "walker"]
    evaluation = report["evaluation"]
    assert {group["value"]: group["episodes"] for group in evaluation["groups"]} == {"scripted": 12, "walker": 12}
    compared = {(one["a"], one["b"], one["metric"], one["pairs"]) for one in evaluation["comparisons"]}
    assert compared == {("walker", "scripted", metric, 12) for metric in ("completion", "return")}
    listed = (await api.client.get("/episode", params={"tag": report["tag"]})).json()["episodes"]
    for policy in ("scripted", "walker"):
        seeds = sorted(episode["metadata"]["seed"] for episode in listed if episode["policy"] == policy)
        assert seeds == list(range(3, 15))
        played = report["policies"][policy]
        assert (played["run_id"], played["episodes"]) == (report["run_id"], 12)
        (group,) = [group for group in evaluation["groups"] if group["value"] == policy]
        assert group["return"]["mean"] == pytest.approx(played["mean_return"])
    assert report["export_command"].startswith(f"episodic export --tag {report['tag']} ")


async def test_the_table_ends_with_the_comparison(api: Served):
    ran = await run(api, "--policies", "walker,base", "--episodes", "2", "--repeat", "2")
    assert ran.exit_code == 0, ran.stderr
    columns = next(line for line in ran.stdout.splitlines() if "random" in line)
    assert columns.index("walker") < columns.index("scripted") < columns.index("random")
    assert "too few" in ran.stdout
    assert "averaged_plays" in ran.stdout
    listed = (await api.client.get("/episode")).json()["episodes"]
    groups = {(episode["policy"], episode["metadata"]["seed"], episode["group"]) for episode in listed}
    assert len(groups) == len({group for _, _, group in groups}) == 4


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (("--policies", "base"), "at least two", 2),
        (("--policies", "base,base"), "different", 2),
        (("--policies", "base,scripted"), "the same policy", 2),
        (("--policies", "base,"), "separated by commas", 2),
        (("--policies", "base,walker", "--policy", "walker"), "either --policy or --policies", 2),
        (("--policies", "base,nobody"), "nobody", 1),
    ],
)
async def test_a_mistake_is_named(api: Served, arguments: tuple[str, ...], message: str, code: int):
    ran = await run(api, *arguments, "--episodes", "1")
    assert ran.exit_code == code
    assert message in " ".join(ran.stderr.replace("│", " ").split())
