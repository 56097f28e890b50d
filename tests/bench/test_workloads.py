"""The workloads: actions have as many tokens as the titles say, prompts are not cached, and the grid is complete."""

from bench.workloads import CHOICE1, CHOICE12, TEXT16, Workload, grid, observations
from service.engine.tokenizer import HFTokenizer
from service.testing.scripted_engine import ScriptedEngine


def _num_tokens(workload: Workload, tokenizer: HFTokenizer) -> list[int]:
    """The number of tokens of each action, without the end of the turn."""
    return [len(sequence) - 1 for sequence in ScriptedEngine(tokenizer).trie(workload.actions).sequences]


def test_actions_have_the_tokens_that_their_title_says(tokenizer: HFTokenizer) -> None:
    assert set(_num_tokens(CHOICE1, tokenizer)) == {1}
    assert 11 <= sum(_num_tokens(CHOICE12, tokenizer)) / len(CHOICE12.actions) <= 13


def test_one_pass_decides_so_that_the_bare_engine_does_the_same_work(tokenizer: HFTokenizer) -> None:
    for workload in (CHOICE1, CHOICE12):
        assert len(ScriptedEngine(tokenizer).trie(workload.actions).branches) == 1


def test_no_two_episodes_of_any_round_share_a_first_observation() -> None:
    firsts = [observations(run, episode, 3)[0] for run in range(4) for episode in range(64)]
    assert len(set(firsts)) == len(firsts)
    assert observations(1, 5, 3) == observations(1, 5, 3)


def test_the_grid_has_every_cell_and_each_is_long_enough_to_measure() -> None:
    cells = grid(quick=False)
    sizes = {(n, k) for n in (1, 8, 32) for k in (20, 100)}
    for workload in (CHOICE1, CHOICE12, TEXT16):
        found = {(cell.num_episodes, cell.num_steps) for cell in cells if cell.workload is workload}
        assert sizes <= found
    assert {cell.name for cell in cells if cell.service_only} == {"choice1 1x200", "choice1 32x200"}
    assert min(cell.num_sets * cell.num_episodes * cell.num_steps for cell in cells) >= 60
