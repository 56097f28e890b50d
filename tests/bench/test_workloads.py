"""The workloads: actions have as many tokens as the titles say, prompts are not cached, and the grid is complete."""

from bench.contenders import NAMES
from bench.workloads import (
    CHOICE1,
    CHOICE12,
    DECISION,
    LABEL,
    REPLY,
    WORKLOADS,
    Workload,
    grid,
    observations,
    played_on,
)
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine


def _num_tokens(workload: Workload, tokenizer: HFTokenizer) -> list[int]:
    """The number of tokens of each action, without the end of the turn."""
    return [len(sequence) - 1 for sequence in ScriptedEngine(tokenizer).trie(workload.actions).sequences]


def test_actions_have_the_tokens_that_their_title_says(tokenizer: HFTokenizer) -> None:
    assert set(_num_tokens(CHOICE1, tokenizer)) == {1}
    assert 11 <= sum(_num_tokens(CHOICE12, tokenizer)) / len(CHOICE12.actions) <= 13


def test_one_pass_decides_so_that_the_bare_engine_does_the_same_work(tokenizer: HFTokenizer) -> None:
    for workload in (CHOICE1, CHOICE12, DECISION):
        assert len(ScriptedEngine(tokenizer).trie(workload.actions).branches) == 1


def test_no_two_episodes_of_any_round_share_a_first_observation() -> None:
    firsts = [observations(run, episode, 3)[0] for run in range(4) for episode in range(64)]
    assert len(set(firsts)) == len(firsts)
    assert observations(1, 5, 3) == observations(1, 5, 3)


def test_the_grid_has_every_cell_and_each_is_long_enough_to_measure() -> None:
    cells = grid(quick=False)
    sizes = {(n, k) for n in (1, 8, 32) for k in (20, 100)}
    for workload in WORKLOADS:
        found = {(cell.num_episodes, cell.num_steps) for cell in cells if cell.workload is workload}
        assert (sizes <= found) == (workload in played_on("policy"))
        assert found
    assert {cell.name for cell in cells if cell.service_only} == {"choice1 1x200", "choice1 32x200"}
    assert [cell.size for cell in cells if cell.workload in (LABEL, REPLY)] == ["1x12", "8x12"] * 2
    assert min(cell.num_sets * cell.num_episodes * cell.num_steps for cell in cells) >= 60


def test_every_contender_plays_cells_and_a_batch_has_several_acts() -> None:
    for cells in (grid(quick=False), grid(quick=True)):
        assert {name for cell in cells for name in cell.contenders} == set(NAMES)
        assert {cell.num_episodes > 1 for cell in cells if "batch" in cell.contenders} == {True}
        assert all(cell.contenders[0] == "service" for cell in cells)


def test_given_texts_are_shown_in_turns() -> None:
    assert observations(2, 1, 3, ("a", "b")) == ["run 2, episode 1: b", "a", "b"]
