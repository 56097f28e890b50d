"""Decision paths: how branches are divided into paths, and that scoring paths leads to the same decisions."""

import math
import random
from contextlib import nullcontext
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.agent.action_spaces import DiscreteSpace
from service.engine.base import Transcript, Wanted
from service.engine.completion import Scores
from service.engine.decision_paths import TriePath, paths
from service.engine.tokenizer import HFTokenizer
from service.engine.vllm import path_scoring
from service.testing.scripted_engine import ScriptedEngine
from service.trajectory import Decision, Sampling
from tests.engine.test_decision_trie import ACTIONS, trie_of

SIMILAR_ACTIONS = tuple(f"{number:010b}" for number in range(0, 1024, 20))


class PathEngine(ScriptedEngine):
    """A scripted engine that scores paths. `is_cached`: its prefix cache contains every place."""

    max_path_candidates = 20
    is_cached = False

    async def score_path(self, prompt_token_ids: list[int], path: TriePath, **_: object) -> list[Scores] | None:
        await self._call([*prompt_token_ids, *path.token_ids], None)
        if self.is_cached:
            return None
        found = []
        for depth, candidates in enumerate(path.candidates):
            place = [*prompt_token_ids, *path.token_ids[: len(path.branches[0].path) + depth]]
            if candidates:
                found.append(await self.score(place, candidates))
                self.prompts.pop()  # counted as part of the request for the path
        return found


@given(ACTIONS, st.data())
def test_paths_contain_each_branch_once_and_are_as_few_as_possible(actions: list[str], data: st.DataObject):
    branches = [branch for branch in trie_of(actions).branches if data.draw(st.booleans())]
    found = paths(branches)
    assert sorted(branch.path for path in found for branch in path.branches) == sorted(one.path for one in branches)
    ends = [one for one in branches if not any(two.path[: len(one.path)] == one.path != two.path for two in branches)]
    assert len(found) == len(ends)
    for path in found:
        for branch in path.branches:
            assert path.token_ids[: len(branch.path)] == branch.path
            assert path.candidates[path.depth(branch)] == list(branch.children)
        assert sum(map(bool, path.candidates)) == len(path.branches)
        assert len(path.token_ids) == len(path.branches[0].path) + len(path.candidates)


async def decided(engine: ScriptedEngine) -> Decision:
    wanted = Wanted(Sampling(temperature=0.7), lambda _: random.Random(5), nullcontext)
    transcript = Transcript("", engine.history(), "Choose.", 4096, slides=True)
    found = await engine.decide(transcript, DiscreteSpace(SIMILAR_ACTIONS, "all"), wanted)
    assert isinstance(found, Decision)
    return found


@pytest.mark.parametrize("limit", [0, 1, 20])
@pytest.mark.parametrize("is_cached", [False, True])
async def test_an_engine_that_scores_paths_makes_the_same_decision(tokenizer: HFTokenizer, limit: int, is_cached: bool):
    plain, engine = ScriptedEngine(tokenizer), PathEngine(tokenizer)
    engine.max_path_candidates, engine.is_cached = limit, is_cached
    assert await decided(engine) == await decided(plain)
    if limit == 20 and not is_cached:
        assert engine.num_calls < plain.num_calls
    if limit < 2:
        assert engine.num_calls == plain.num_calls


async def test_a_path_that_fills_the_context_is_scored_branch_by_branch(tokenizer: HFTokenizer):
    engine = PathEngine(tokenizer)
    await decided(engine)
    longest = max(map(len, engine.prompts))
    full = PathEngine(tokenizer, max_model_len=longest)
    assert (await decided(full)).action_probs == (await decided(engine)).action_probs
    assert max(map(len, full.prompts)) < longest


async def test_an_engine_with_wrong_scores_of_paths_is_found_out(tokenizer: HFTokenizer):
    class Wrong(PathEngine):
        async def score_path(
            self, prompt_token_ids: list[int], path: TriePath, **options: object
        ) -> list[Scores] | None:
            found = await super().score_path(prompt_token_ids, path, **options)
            return found and [replace(one, logprobs=(math.nan, *one.logprobs[1:])) for one in found]

    cached = PathEngine(tokenizer)
    cached.is_cached = True
    assert await path_scoring.fault(PathEngine(tokenizer)) is None
    assert await path_scoring.fault(Wrong(tokenizer)) == "scores differ by nan"
    assert await path_scoring.fault(cached) == "the engine returned no scores"
