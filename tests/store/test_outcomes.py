"""What an evaluation reads: pages of outcomes with tags, ratings and roots, and sampled steps."""

from dataclasses import replace
from typing import Any

from service.store.base import Outcome, Store
from service.trajectory import Feedback, StopReason
from tests.store.test_stores import commit, fork, record


async def every(store: Store, **options: Any) -> list[Outcome]:
    options = {"limit": 99, "after": None, "tenant": "default", "by": "policy", **options}
    return list((await store.outcomes(**options)).outcomes)


async def test_an_outcome_has_what_is_stored(store: Store):
    await store.create(record(group="g", profile="x", metadata={"env": "lake", "seed": 7}))
    await store.commit(commit(0))
    await store.commit(commit(1, ends=StopReason.TERMINATED))
    (found,) = await every(store)
    assert found == Outcome(
        episode_id="e",
        created_at=1.0,
        parent_id=None,
        value="p",
        env="lake",
        seed="7",
        policy_version="v1",
        status="ended",
        stop_reason="terminated",
        success=1,
        episode_return=1.0,
        step=1,
        num_tokens=6,
        num_parse_failures=None,
        num_recorded=None,
        root="e",
    )
    for by, value in {"profile": "x", "group": "g", "env": "lake", "policy_version": "v1", "tag": None}.items():
        (found,) = await every(store, by=by)
        assert found.value == value, by


async def test_the_counts_of_an_episode_are_kept(store: Store):
    await store.create(replace(record(), state=replace(record().state, num_parse_failures=0, num_recorded=0)))
    act = commit(0)
    counted = replace(act, state=replace(act.state, num_parse_failures=2, num_recorded=1))
    await store.commit(counted)
    (found,) = await every(store)
    assert (found.num_parse_failures, found.num_recorded) == (2, 1)
    stored = await store.episode("e")
    assert stored is not None
    assert stored.state == counted.state


async def test_pages_are_complete_and_oldest_first(store: Store):
    for number in range(7):
        await store.create(record(f"e{number}", float(number // 2), tags=["x"] if number else []))
    await store.create(record("acme:e", 0.0))
    await store.delete("e3")
    found: list[str] = []
    place = None
    while page := await every(store, limit=2, after=place):
        found += [one.episode_id for one in page]
        place = (page[-1].created_at, page[-1].episode_id)
    assert found == ["e0", "e1", "e2", "e4", "e5", "e6"]
    assert [one.episode_id for one in await every(store, where={"tag": "x"})] == found[1:]
    assert [one.episode_id for one in await every(store, tenant="acme")] == ["acme:e"]
    assert await every(store, where={"group": "a\0"}) == []


async def test_a_page_has_the_tags_and_the_ratings_of_whole_episodes(store: Store):
    await store.create(record("a", 1.0, tags=["y", "x", "y"]))
    await store.create(record("b", 2.0))
    for rater, rating, step in (("ann", 3, None), ("ann", 4, None), (None, 1, None), ("bob", 2, 0)):
        await store.add_feedback(Feedback("a", step, rating, None, rater, 3.0))
    page = await store.outcomes(limit=9, after=None, tenant="default", by="tag")
    assert {name: list(tags) for name, tags in page.tags.items() if tags} == {"a": ["x", "y"]}
    assert {name: list(given) for name, given in page.ratings.items()} == {"a": [("ann", 4), (None, 1)]}
    assert not (await store.outcomes(limit=9, after=None, tenant="default", by="policy")).tags


async def test_the_root_of_a_fork_stores_its_first_step(store: Store):
    await store.create(record("root"))
    await store.commit(commit(0, "root"))
    await store.fork([fork("child", "root", 1)])
    await store.fork([fork("fresh", "root", 0)])
    await store.commit(commit(1, "child"))
    await store.fork([fork("grandchild", "child", 2)])
    await store.delete("root")
    roots = {one.episode_id: (one.parent_id, one.root) for one in await every(store)}
    assert roots == {
        "child": ("root", "root"),
        "fresh": ("root", "fresh"),
        "grandchild": ("child", "root"),
    }


async def test_sampled_steps_are_the_own_first_steps(store: Store):
    await store.create(record("a"))
    for index in range(3):
        await store.commit(commit(index, "a", seconds=0.5 + index, temperature=0.7))
    await store.fork([fork("b", "a", 2)])
    await store.commit(commit(2, "b"))
    await store.commit(commit(3, "b", ends=StopReason.TERMINATED))
    assert await store.step_samples(["a"], 2) == [("a", 0.5, 0.7), ("a", 1.5, 0.7)]
    assert await store.step_samples(["b"], 99) == [("b", None, None)]
    assert await store.step_samples([], 99) == []
