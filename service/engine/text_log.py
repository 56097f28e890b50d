"""The history of an episode for an encoder-decoder model: the texts of its steps.

The encoder reads the whole window again at each step, so the history keeps no tokens.
"""

from collections.abc import Sequence

from service.engine.prompt import observation_text
from service.trajectory import Step

Turn = tuple[str, str]
"""The text of an observation, and that of the action for it."""


class TextLog:
    """The turns of an episode. As for a decoder-only model, a window consists of step 0 and every step from `start` on,
    because step 0 often says what the later ones are about.

    start: the first step after step 0 that the current window contains. Later windows never start earlier.
    """

    __slots__ = ("_turns", "start")

    def __init__(self, turns: Sequence[Turn] = (), start: int = 1) -> None:
        self._turns = list(turns)
        self.start = start

    def copy(self) -> "TextLog":
        return TextLog(self._turns, self.start)

    @property
    def num_steps(self) -> int:
        return len(self._turns)

    def append(self, step: Step) -> None:
        """Adds a committed step, and sets `start` to that of its window."""
        self._turns.append((observation_text(step.message.observation), step.answer["text"]))
        self.start = step.window_start

    def window(self, start: int) -> Sequence[Turn]:
        """Returns the turns of the window from `start`: step 0 and the steps from `start` on."""
        return [*self._turns[:1], *self._turns[start:]]
