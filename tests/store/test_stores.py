"""What every store guarantees: conditional commits, pagination, tombstones, and values that are read back unchanged."""

import asyncio
import math
from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.filters import EpisodeFilter
from service.store.base import EVERY, KEPT_MOVES, Commit, EpisodeExists, EpisodeGone, StepTaken, Store
from service.store.schema import episode_record, episode_row, step_row, step_value
from service.store.sql import SQLStore
from service.trajectory import (
    EpisodeConfig,
    EpisodeState,
    Feedback,
    Message,
    Span,
    Step,
    StopReason,
    StoredEpisode,
    StoredKey,
    StoredVersion,
)


def record(name: str = "e", created_at: float = 1.0, **request: Any) -> StoredEpisode:
    config = EpisodeConfig(name, {"policy": "p", **request}, b"d" * 16, "v1", created_at)
    return StoredEpisode(config, EpisodeState(updated_at=created_at))


def step(index: int, name: str = "e", *, closing: bool = False, **fields: Any) -> Step:
    span = Span(array("i", [index, 2, 3]), b"\x00\x01\x01", array("f", [0.0, -0.5, -1.5]))
    answer = {"episode_id": name, "step": index, "action": None if closing else f"action {index}"}
    values: dict[str, Any] = {
        "message": Message(f"observation {index}", reward=1.0),
        "closing": closing,
        "span": span,
        "window_start": 1,
        "answer": answer,
        "digest": b"x" * 16,
        "created_at": 2.0 + index,
        **fields,
    }
    return Step(name, index, **values)


def commit(index: int, name: str = "e", *, ends: StopReason | None = None, **fields: Any) -> Commit:
    state = EpisodeState(
        step=index + (not ends),
        status="ended" if ends else "active",
        stop_reason=ends,
        success=True if ends else None,
        episode_return=float(index),
        num_tokens=3 * (index + 1),
        updated_at=2.0 + index,
        ended_at=2.0 + index if ends else None,
    )
    return Commit(step(index, name, closing=ends is not None, **fields), state)


async def test_what_was_created_is_found(store: Store):
    await store.create(record(goal="win", metadata={"a": [1, None, "ü\u0000"]}))
    assert await store.episode("e") == record(goal="win", metadata={"a": [1, None, "ü\u0000"]})
    assert await store.episode("f") is None
    assert await store.steps("e") == await store.steps("f") == []


async def test_an_id_is_created_once(store: Store):
    await store.create(record(goal="first"))
    with pytest.raises(EpisodeExists):
        await store.create(record(goal="second"))
    found = await store.episode("e")
    assert found is not None
    assert found.config.request["goal"] == "first"


async def test_ids_differ_by_case(store: Store):
    await store.create(record("e"))
    await store.create(record("E", goal="other"))
    found = await store.episode("E")
    assert found is not None
    assert found.config.request["goal"] == "other"


async def test_commits_come_back_in_order_with_the_head(store: Store):
    await store.create(record())
    for index in range(12):
        await store.commit(commit(index))
    await store.commit(commit(12, ends=StopReason.TERMINATED))
    assert await store.steps("e") == [*map(step, range(12)), step(12, closing=True)]
    assert await store.steps("e", 7) == [step(7)]
    assert await store.steps("e", 13) == []
    found = await store.episode("e")
    assert found is not None
    assert found.state == commit(12, ends=StopReason.TERMINATED).state
    assert found.config == record().config


@pytest.mark.parametrize("index", [0, 1, 3, 4])
async def test_a_commit_needs_exactly_the_steps_before_it(store: Store, index: int):
    await store.create(record())
    for earlier in range(2):
        await store.commit(commit(earlier))
    with pytest.raises(StepTaken):
        await store.commit(commit(index))
    assert [row.index for row in await store.steps("e")] == [0, 1]
    found = await store.episode("e")
    assert found is not None
    assert found.state == commit(1).state


async def test_ended_episode_accepts_no_commit(store: Store):
    await store.create(record())
    await store.commit(commit(0, ends=StopReason.ABORTED))
    for index in (0, 1):
        with pytest.raises(StepTaken):
            await store.commit(commit(index))
    assert len(await store.steps("e")) == 1


async def test_nothing_is_committed_where_no_episode_is(store: Store):
    with pytest.raises(StepTaken):
        await store.commit(commit(0, "nobody"))
    assert await store.steps("nobody") == []


async def test_of_those_that_race_for_a_step_one_wins(store: Store):
    await store.create(record())
    racers = [commit(0, message=Message(f"racer {number}")) for number in range(10)]
    results = await asyncio.gather(*(store.commit(racer) for racer in racers), return_exceptions=True)
    assert sorted(map(str, map(type, results))) == sorted([str(type(None))] + [str(StepTaken)] * 9)
    (stored,) = await store.steps("e")
    assert stored.message == racers[results.index(None)].step.message


async def test_a_refused_commit_spoils_no_other(store: Store):
    names = [f"e{number}" for number in range(20)]
    for name in names:
        await store.create(record(name))
    await store.commit(commit(0, "e5"))
    commits = [store.commit(commit(0, name)) for name in names]
    creates = [store.create(record("e3")), store.create(record("new"))]
    results = await asyncio.gather(*commits, *creates, return_exceptions=True)
    assert [type(result) for result in results] == [StepTaken if name == "e5" else type(None) for name in names] + [
        EpisodeExists,
        type(None),
    ]
    assert [len(await store.steps(name)) for name in names] == [1] * 20
    assert await store.episode("new") == record("new")


async def test_a_deleted_episode_leaves_a_tombstone(store: Store):
    await store.create(record(goal="secret"))
    await store.commit(commit(0))
    assert await store.delete("e")
    assert not await store.delete("e")
    assert not await store.delete("nobody")
    assert await store.steps("e") == []
    found = await store.episode("e")
    assert found is not None
    assert found.deleted
    assert found.config.request == {}
    assert await store.episodes(limit=10, before=None, where=EVERY) == []
    with pytest.raises(StepTaken):
        await store.commit(commit(1))
    with pytest.raises(EpisodeExists):
        await store.create(record())


async def test_active_episodes_are_counted(store: Store):
    assert await store.num_active() == 0
    for name in ("acting", "ended", "deleted", "new"):
        await store.create(record(name))
    await store.commit(commit(0, "acting"))
    await store.commit(commit(0, "ended", ends=StopReason.TERMINATED))
    await store.delete("deleted")
    assert await store.num_active() == 2


async def test_a_tenants_episodes_are_counted_and_listed_apart(store: Store):
    for name, at in (("a", 1.0), ("acme:a", 2.0), ("acme:b", 3.0), ("ac:a", 4.0)):
        await store.create(record(name, at, group="g"))
    await store.commit(commit(0, "acme:a", ends=StopReason.TERMINATED))
    assert [await store.num_active(tenant) for tenant in ("default", "acme", "ac", "nobody", None)] == [1, 1, 1, 0, 3]
    found: list[tuple[str, EpisodeFilter, list[str]]] = [
        ("default", {}, ["a"]),
        ("acme", {}, ["acme:b", "acme:a"]),
        ("acme", {"status": "ended", "group": "g"}, ["acme:a"]),
        ("nobody", {}, []),
    ]
    for tenant, where, names in found:
        rows = await store.episodes(limit=10, before=None, tenant=tenant, where=where)
        assert [row.config.episode_id for row in rows] == names, (tenant, where)
    (older,) = await store.episodes(limit=10, before=(3.0, "acme:b"), tenant="acme")
    assert older.config.tenant == "acme"
    await store.delete("acme:b")
    assert await store.num_active("acme") == 0


async def test_keys_are_kept_and_revoked_once(store: Store):
    assert await store.keys() == []
    first = StoredKey("k2", b"\0" * 32, "acme", ("act", "read"), 1.0)
    second = StoredKey("k1", b"\1" * 32, "default", (), 2.0)
    await store.add_key(first)
    await store.add_key(second)
    assert await store.keys() == [first, second]
    assert await store.revoke_key("k2", 3.0)
    assert not await store.revoke_key("k2", 4.0)
    assert not await store.revoke_key("nobody", 4.0)
    assert await store.keys() == [replace(first, revoked_at=3.0), second]


def version(name: str, digest: str, **lineage: Any) -> StoredVersion:
    return StoredVersion(name, digest, "v", 8, 1.0, **lineage)


async def test_an_alias_points_to_the_last_version_that_moved_it(store: Store):
    for name, digest in (("b", "1"), ("a", "2"), ("b", "3")):
        await store.put_version(version(name, digest), move_alias=True)
    await store.put_version(version("b", "4"), move_alias=False)
    catalog = await store.catalog()
    assert catalog.aliases == {"a": "2", "b": "3"}
    assert catalog.previous == {"b": "1"}
    assert [(one.name, one.digest) for one in catalog.versions] == [("a", "2"), ("b", "1"), ("b", "3"), ("b", "4")]
    assert await store.delete_alias("b")
    assert not await store.delete_alias("nobody")
    after = await store.catalog()
    assert (after.aliases, after.previous, after.versions) == ({"a": "2"}, {}, catalog.versions)


async def test_a_later_lineage_replaces_only_what_it_names(store: Store):
    await store.put_version(version("p", "1", parent="p@0", round=3), move_alias=False)
    stored = await store.put_version(version("p", "1", evaluation='{"won":1}'), move_alias=True)
    assert stored == version("p", "1", parent="p@0", round=3, evaluation='{"won":1}')
    assert (await store.catalog()).versions == (stored,)


async def test_a_rollback_goes_back_one_version_at_a_time(store: Store):
    for digest in ("1", "2", "1", "1", "3"):
        await store.put_version(version("p", digest), move_alias=True)
    assert (await store.catalog()).previous == {"p": "1"}
    for digest in ("1", "2", "1"):
        assert await store.roll_back("p") == version("p", digest)
        assert (await store.catalog()).aliases == {"p": digest}
    assert await store.roll_back("p") is None
    assert await store.roll_back("nobody") is None
    assert (await store.catalog()).aliases == {"p": "1"}


async def test_the_history_of_an_alias_is_bounded(store: Store):
    for number in range(KEPT_MOVES + 5):
        await store.put_version(version("p", str(number)), move_alias=True)
    num_back = 0
    while await store.roll_back("p"):
        num_back += 1
    assert num_back == KEPT_MOVES - 1


async def test_only_versions_that_nothing_uses_are_removed(store: Store):
    for digest in ("gone", "old", "current"):
        await store.put_version(version("p", digest), move_alias=digest != "gone")
    for digest in ("default", "kept", "active", "legacy", "ended", "unused"):
        weights = "v1" if digest == "legacy" else "v2"  # an older release stored only these with an episode
        await store.put_version(replace(version("q", digest), version=weights), move_alias=False)
    await store.put_version(version("r", "active"), move_alias=False)
    await store.set_default_policy("q@def")
    for name, digest in (("a", "active"), ("b", None), ("c", "ended")):
        opened = record(name)
        await store.create(replace(opened, config=replace(opened.config, policy_digest=digest)))
    await store.commit(commit(0, "c", ends=StopReason.TERMINATED))
    removed = await store.remove_unused_versions(["q@kep"])
    assert {one.reference for one in removed} == {"p@gone", "q@ended", "q@unused"}
    assert {one.reference for one in (await store.catalog()).versions} == {
        *("p@old", "p@current", "q@default", "q@kept", "q@active", "q@legacy", "r@active")
    }
    await store.roll_back("p")
    assert {one.reference for one in await store.remove_unused_versions()} == {"p@current", "q@kept"}


async def test_the_default_policy_is_kept_and_every_change_marks_the_catalog(store: Store):
    marks = [await store.catalog_marks()]
    for change in (
        store.put_version(version("p", "1"), move_alias=True),
        store.put_version(version("p", "2"), move_alias=False),
        store.put_version(version("p", "2"), move_alias=True),
        store.set_default_policy("p"),
        store.delete_alias("p"),
    ):
        await change
        changed = await store.catalog_marks()
        assert changed not in marks
        marks.append(changed)
    assert (await store.catalog()).default == "p"
    await store.set_default_policy(None)
    assert (await store.catalog()).default is None
    assert await store.catalog_marks() == await store.catalog_marks()


async def test_the_version_that_an_episode_is_pinned_to_is_kept(store: Store):
    pinned = record()
    pinned = replace(pinned, config=replace(pinned.config, policy_digest="a" * 64))
    await store.create(pinned)
    assert await store.episode("e") == pinned


async def test_pages_are_newest_first_and_complete(store: Store):
    for number in range(25):
        await store.create(record(f"e{number:02}", created_at=float(number // 3)))  # three have the same time
    await store.commit(commit(0, "e07", ends=StopReason.TRUNCATED))
    found: list[StoredEpisode] = []
    before = None
    while page := await store.episodes(limit=4, before=before, where=EVERY):
        assert len(page) <= 4
        found += page
        before = (page[-1].config.created_at, page[-1].config.episode_id)
    places = [(row.config.created_at, row.config.episode_id) for row in found]
    assert places == sorted(places, reverse=True)
    assert {name for _, name in places} == {f"e{number:02}" for number in range(25)}
    assert len(places) == 25
    ended = await store.episodes(limit=100, before=None, where={"status": "ended"})
    assert [row.config.episode_id for row in ended] == ["e07"]
    assert len(await store.episodes(limit=100, before=None, where={"status": "active"})) == 24


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\0\n'%:", max_size=3), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.builds(
    Message,
    observation=JSON,
    reward=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    terminated=st.booleans(),
    truncated=st.booleans(),
    success=st.none() | st.booleans(),
    info=st.none() | st.dictionaries(st.text("ab", max_size=2), JSON, max_size=2),
    legal_actions=st.none() | st.lists(st.text(max_size=3, alphabet="ab'"), max_size=3).map(tuple),
)
FLOAT32 = st.floats(width=32, allow_nan=False, max_value=0)
TOKENS = st.integers(0, 2**31 - 1)
SPANS = st.builds(
    lambda rows, encoder_ids, support: Span(
        array("i", [token for token, _, _ in rows]),
        bytes(drawn for _, drawn, _ in rows),
        array("f", [logprob for _, _, logprob in rows]),
        encoder_ids,
        array("i", support),
    ),
    st.lists(st.tuples(TOKENS, st.integers(0, 1), FLOAT32), max_size=9),
    st.none() | st.lists(TOKENS, max_size=9).map(lambda ids: array("i", ids)),
    st.lists(st.integers(-3, 2**31 - 1), max_size=9),
)
"""Spans with one stream of tokens (decoder-only) or two (encoder-decoder)."""
STEPS = st.builds(
    Step,
    episode_id=st.just("e"),
    index=st.just(0),
    message=MESSAGES,
    closing=st.booleans(),
    span=SPANS,
    window_start=st.integers(1, 10_000),
    answer=st.dictionaries(st.text("ab", max_size=2), JSON, max_size=3),
    digest=st.binary(min_size=16, max_size=16),
    created_at=st.floats(0, 1e10),
    idempotency_key=st.none() | st.text("ab'\"\\", min_size=1, max_size=9),
    temperature=st.none() | st.floats(0, 100),
    seconds=st.none() | st.floats(0, 1e6),
)


@given(STEPS)
def test_step_row_round_trip(value: Step):
    assert step_value(step_row(value)) == value  # pyright: ignore[reportArgumentType]


@given(
    st.dictionaries(st.text("ab", max_size=2), JSON, max_size=3),
    st.sampled_from([None, *StopReason]),
    st.none() | st.booleans(),
)
def test_an_episode_survives_being_a_row(request_: dict[str, Any], reason: StopReason | None, success: bool | None):
    state = EpisodeState(stop_reason=reason, success=success, episode_return=math.pi)
    value = replace(record(**request_), state=state)
    row: Any = {**episode_row(value), "deleted_at": None}
    assert episode_record(row) == value


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=STEPS, number=st.uuids())
async def test_a_step_survives_the_store(store: Store, value: Step, number: Any):
    name = str(number)
    if await store.episode(name):
        return
    await store.create(record(name))
    value = replace(value, episode_id=name)
    await store.commit(Commit(value, EpisodeState(step=1)))
    assert await store.steps(name) == [value]


def fork(name: str, parent: str, at_step: int, **request: Any) -> StoredEpisode:
    config = EpisodeConfig(name, {"policy": "p", **request}, b"f" * 16, "v1", 5.0, (parent, at_step))
    return StoredEpisode(config, EpisodeState(step=at_step, updated_at=5.0))


async def _grown(store: Store, name: str, num_steps: int, start: int = 0) -> None:
    for index in range(start, num_steps):
        await store.commit(commit(index, name))


async def test_a_fork_reads_its_ancestors_rows_and_then_its_own(store: Store):
    await store.create(record("root"))
    await _grown(store, "root", 4)
    await store.fork([fork("child", "root", 3), fork("twin", "root", 3)])
    await _grown(store, "child", 6, start=3)
    await store.fork([fork("grandchild", "child", 5)])
    await store.fork([fork("early", "child", 2)])
    await _grown(store, "grandchild", 6, start=5)
    rows = {
        name: [row.episode_id for row in await store.steps(name)] for name in ("child", "grandchild", "early", "twin")
    }
    if isinstance(store, SQLStore):
        assert rows["child"] == ["root"] * 3 + ["child"] * 3
        assert rows["grandchild"] == ["root"] * 3 + ["child"] * 2 + ["grandchild"]
        assert rows["early"] == ["root"] * 2
    assert [row.index for row in await store.steps("grandchild")] == list(range(6))
    assert [row.index for row in await store.steps("grandchild", 4)] == [4]
    assert len(rows["twin"]) == 3
    child = await store.episode("child")
    assert child is not None
    assert child.config.parent == ("root", 3)


async def test_a_deleted_ancestors_rows_live_as_long_as_a_fork_reads_them(store: Store):
    await store.create(record("root"))
    await _grown(store, "root", 3)
    await store.fork([fork("child", "root", 2)])
    await store.fork([fork("grandchild", "child", 2)])
    assert await store.delete("root")
    assert len(await store.steps("child")) == 2
    assert await store.delete("child")
    assert len(await store.steps("grandchild")) == 2
    assert await store.delete("grandchild")
    assert await store.steps("root") == await store.steps("grandchild") == []


async def test_a_deleted_episode_is_not_forked(store: Store):
    await store.create(record("root"))
    await store.delete("root")
    with pytest.raises(EpisodeGone):
        await store.fork([fork("child", "root", 0)])
    assert await store.episode("child") is None


async def test_forks_are_made_all_or_none(store: Store):
    await store.create(record("root"))
    await store.create(record("taken"))
    with pytest.raises(EpisodeExists):
        await store.fork([fork("free", "root", 0), fork("taken", "root", 0)])
    assert await store.episode("free") is None


async def test_episodes_are_found_by_their_labels(store: Store):
    await store.create(record("a", 1.0, tags=["x", "y", "x"], group="g", profile="p1"))
    await store.create(record("b", 2.0, tags=["y"], group="h"))
    await store.create(StoredEpisode(EpisodeConfig("c", {"policy": "q"}, b"d" * 16, "v1", 3.0)))
    found: list[tuple[EpisodeFilter, list[str]]] = [
        ({"tag": "y"}, ["b", "a"]),
        ({"tag": "x"}, ["a"]),
        ({"tag": "%"}, []),
        ({"group": "g"}, ["a"]),
        ({"policy": "q"}, ["c"]),
        ({"profile": "p1"}, ["a"]),
        ({"tag": "y", "group": "h", "status": "active"}, ["b"]),
        ({"tag": "y", "status": "ended"}, []),
    ]
    for where, names in found:
        rows = await store.episodes(limit=10, before=None, where=where)
        assert [row.config.episode_id for row in rows] == names, where
    await store.delete("a")
    assert await store.episodes(limit=10, before=None, where={"tag": "x"}) == []


async def test_expiry_is_the_active_episodes(store: Store):
    assert await store.next_expiry() is None
    for name, at in (("late", 9.0), ("soon", 4.0), ("never", None)):
        await store.create(StoredEpisode(record(name).config, EpisodeState(updated_at=1.0, expires_at=at)))
    assert await store.next_expiry() == 4.0
    assert await store.expired(3.9, 10) == []
    assert await store.expired(9.0, 10) == ["soon", "late"]
    assert await store.expired(9.0, 1) == ["soon"]
    await store.delete("soon")
    assert await store.next_expiry() == 9.0


async def test_a_named_raters_newer_rating_takes_the_place_of_the_older(store: Store):
    await store.create(record("e"))
    for rating, rater, at in ((1, "ann", None), (2, None, None), (3, None, None), (4, "ann", 0), (5, "ann", None)):
        await store.add_feedback(Feedback("e", at, rating, None, rater, float(rating)))
    assert [(rating.rating, rating.rater, rating.step) for rating in await store.feedback("e")] == [
        (2, None, None),
        (3, None, None),
        (4, "ann", 0),
        (5, "ann", None),
    ]
    await store.delete("e")
    assert await store.feedback("e") == []


async def test_a_deleted_episode_is_not_rated(store: Store):
    await store.create(record())
    await store.delete("e")
    with pytest.raises(EpisodeGone):
        await store.add_feedback(Feedback("e", None, 3, None, None, 1.0))
    assert await store.feedback("e") == []


async def test_a_trajectory_is_the_episode_and_its_rows(store: Store):
    assert await store.trajectory("e") is None
    await store.create(record())
    await store.commit(commit(0))
    found = await store.trajectory("e")
    assert found is not None
    assert found[0].state == commit(0).state
    assert found[1] == [step(0)]


async def test_a_missing_episode_can_be_neither_rated_nor_forked(store: Store):
    fork = record("f")
    fork = replace(fork, config=replace(fork.config, parent=("missing", 0)))
    with pytest.raises(EpisodeGone):
        await store.fork([fork])
    with pytest.raises(EpisodeGone):
        await store.add_feedback(Feedback("missing", None, 5, None, None, 1.0))
