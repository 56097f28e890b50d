"""Decision paths: branches of a decision trie that one request can score, because they are on one path."""

from collections.abc import Sequence

from service.engine.decision_trie import Branch
from service.values import immutable


@immutable
class TriePath:
    """Branches on one path from the root, the shallowest first."""

    branches: tuple[Branch, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens of the path, up to and including one child of the deepest branch.

        An engine scores the place before each token of a prompt, so the deepest branch needs a token behind it.
        """
        deepest = self.branches[-1]
        return (*deepest.path, deepest.children[0])

    @property
    def candidates(self) -> list[list[int]]:
        """The candidates at each place from the first branch to the last: a branch's children, or none."""
        rows: list[list[int]] = [[] for _ in range(self.depth(self.branches[-1]) + 1)]
        for branch in self.branches:
            rows[self.depth(branch)] = list(branch.children)
        return rows

    def depth(self, branch: Branch) -> int:
        """The number of places from the first branch to this one."""
        return len(branch.path) - len(self.branches[0].path)

    @property
    def num_candidates(self) -> int:
        """The largest number of candidates at one place."""
        return max(len(branch.children) for branch in self.branches)


def paths(branches: Sequence[Branch]) -> list[TriePath]:
    """Divides branches of one trie into as few paths as possible. Each branch is on one of them."""
    found: list[list[Branch]] = []
    # In this order, a branch comes directly after one that is below it, if there is one.
    for branch in sorted(branches, key=lambda one: one.path, reverse=True):
        if found and found[-1][0].path[: len(branch.path)] == branch.path:
            found[-1].append(branch)
        else:
            found.append([branch])
    return [TriePath(tuple(reversed(chain))) for chain in found]
