"""The report of many episodes: pages, samples, groups, warnings and limits. The episodes are in memory."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.errors import Unprocessable
from service.evaluation import columns
from service.evaluation.caveats import RULES
from service.evaluation.columns import Sample
from service.evaluation.evaluate import MAX_SAMPLED_STEPS, evaluate
from service.evaluation.markdown import escaped
from service.evaluation.report import Question, Report
from service.store.base import StepSample
from service.testing.memory_store import MemoryStore
from service.trajectory import EpisodeConfig, EpisodeState, Feedback, StopReason, StoredEpisode
from tests.store.test_stores import commit

STATE = EpisodeState(
    step=4,
    status="ended",
    stop_reason=StopReason.TERMINATED,
    success=True,
    num_tokens=9,
    num_parse_failures=0,
    num_recorded=0,
    ended_at=2.0,
)
GROUPED = Question(by="group")


class Store(MemoryStore):
    """A store that counts the steps that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.num_read = 0
        self._numbers = itertools.count()

    async def add(self, group: str = "g", *, version: str = "v", parent: Any = None, **fields: Any) -> str:
        """Adds an ended episode; `fields` are of its state or its metadata."""
        number = next(self._numbers)
        state = {name: fields.pop(name) for name in list(fields) if hasattr(STATE, name)}
        request = {"policy": "p", "group": group, "metadata": {"env": "lake", **fields}}
        config = EpisodeConfig(f"e{number:06}", request, b"", version, float(number), parent)
        await self.create(StoredEpisode(config, replace(STATE, **state)))
        return config.episode_id

    async def step_samples(self, episode_ids: Sequence[str], num_steps: int) -> list[StepSample]:
        self.num_read += sum(min(self._episodes[name].state.step, num_steps) for name in episode_ids)
        return await super().step_samples(episode_ids, num_steps)

    async def report(self, question: Question = GROUPED) -> Report:
        return await evaluate(self, "default", {}, question)


@pytest.fixture
def store() -> Store:
    return Store()


async def test_every_page_is_read(store: Store):
    for number in range(2_345):
        await store.add(f"g{number % 2}", episode_return=float(number), seed=number)
    report = await store.report()
    assert [(group.value, group.episodes) for group in report.groups] == [("g0", 1173), ("g1", 1172)]
    assert [group.returns.mean for group in report.groups] == [1172.0, 1172.0]


@pytest.mark.parametrize(("num_groups", "length"), [(1, 100_000), (2, 300), (40, 3), (40, 5_000)])
async def test_a_bounded_number_of_steps_is_read_from_every_group(store: Store, num_groups: int, length: int):
    for number in range(400):
        await store.add(f"g{number % num_groups}", step=length)
    await store.report()
    assert num_groups <= store.num_read <= MAX_SAMPLED_STEPS


def test_a_sample_is_spread_over_all_episodes():
    sample = Sample()
    for number in range(10_000):
        sample.add(str(number), 10)
    found = [int(name) for name in sample.within(500)]
    assert 25 <= len(found) <= 50
    gaps = {after - before for before, after in itertools.pairwise(found)}
    assert len(gaps) == 1
    assert found[0] == 0
    assert found[-1] + gaps.pop() >= 10_000


async def test_what_did_not_end_by_its_environment_has_no_result(store: Store):
    for reason in StopReason:
        await store.add(stop_reason=reason, episode_return=1.0)
    await store.add(status="active", stop_reason=None, success=None)
    (group,) = (await store.report()).groups
    assert group.excluded == {"active": 1, "aborted": 1, "idle_ttl": 1}
    assert (group.episodes, group.ended, group.completion.n, group.returns.n) == (7, 6, 4, 4)
    assert (group.tokens.total, group.parse_failures) == (36, 0)


WARNINGS: dict[str, list[dict[str, Any]]] = {
    "several_envs": [{"env": "lake"}, {"env": "taxi"}],
    "several_versions": [{"version": "v"}, {"version": "w"}],
    "recorded_actions": [{}, {"num_recorded": 2}],
    "parse_failures_unknown": [{"num_parse_failures": None}],
    "few_episodes": [{}],
}


@pytest.mark.parametrize("code", WARNINGS)
async def test_a_warning_says_what_limits_the_report(store: Store, code: str):
    question = Question(by="policy")
    for _ in range(30):
        await store.add()
    assert await store.report(question) == await store.report(question)
    assert [warning.code for warning in (await store.report(question)).warnings] == []
    if code == "few_episodes":
        store.__init__()
    for fields in WARNINGS[code]:
        await store.add(**fields)
    (warning,) = (await store.report(question)).warnings
    assert warning.code == code
    assert warning.detail.endswith(" Groups: 'p'.")


def test_every_warning_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for code in ("no_episodes", *(code for code, _, _ in RULES)):
        assert f"`{code}`" in page, code


@pytest.mark.parametrize(
    ("own", "others", "is_warned"), [([0.0], [0.0], False), ([0.0, 1.0], [0.0], True), ([1.0], [0.0], True)]
)
async def test_a_warning_names_different_temperatures(
    store: Store, own: list[float], others: list[float], is_warned: bool
):
    for group, temperatures in (("own", own), ("base", others)):
        for number in range(30):
            act = commit(0, temperature=temperatures[number % len(temperatures)], seconds=1.0 + number)
            name = await store.add(group, status="active", step=0)
            await store.commit(replace(act, step=replace(act.step, episode_id=name), state=STATE))
    report = await store.report(Question(by="group", baseline="base"))
    found = [warning.detail for warning in report.warnings if warning.code == "different_temperatures"]
    assert [detail.endswith("Groups: 'own'.") for detail in found] == [True] * is_warned
    assert (report.groups[0].act_seconds.p50, report.groups[0].act_seconds.p99) == (15.0, 30.0)


async def test_ratings_by_one_person_are_named(store: Store):
    for _ in range(30):
        name = await store.add()
        await store.add_feedback(Feedback(name, None, 4, None, "ann", 1.0))
    report = await store.report()
    assert (report.groups[0].human.n, report.groups[0].human.raters, report.groups[0].human.alpha) == (30, 1, None)
    assert [warning.code for warning in report.warnings] == ["one_rater"]


async def test_k_is_the_most_common_number_of_plays(store: Store):
    for seed, num_plays in enumerate([1, 2, 2, 3, 3]):
        for number in range(num_plays):
            await store.add(seed=seed, success=number == 0)
    root = await store.add(seed=9)
    await store.add(seed=9, parent=(root, 1))  # a fork is no play of its own
    (group,) = (await store.report()).groups
    assert group.pass_at == {1: pytest.approx((1 + 0.5 + 0.5 + 1 / 3 + 1 / 3 + 1) / 6), 3: 1.0}
    assert group.pass_all == {3: 0.0}


async def test_too_much_for_one_report_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch):
    for number in range(columns.MAX_GROUPS):
        await store.add(f"g{number}")
    assert len((await store.report()).groups) == columns.MAX_GROUPS
    await store.add("one more")
    with pytest.raises(Unprocessable, match="more than 1,000 values"):
        await store.report()
    monkeypatch.setattr(columns, "MAX_EPISODES", 1_000)
    with pytest.raises(Unprocessable, match="more than 1,000 episodes match"):
        await store.report(Question(by="policy"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain-text_1.0", "plain-text\\_1.0"),
        ("a|b", "a\\|b"),
        ("a\\|b", "a\\\\\\|b"),
        ("`code`", "\\`code\\`"),
        ("<b>", "\\<b\\>"),
        ("a\nb\0\u202ec", "a\ufffdb\ufffd\ufffdc"),
        ("name@digest #x", "name@digest \\#\u2060x"),
        ("@ann", "@\u2060ann"),
        ("http://x", "http\\://x"),
    ],
)
def test_text_is_escaped_for_markdown(text: str, shown: str):
    assert escaped(text) == shown
