"""An environment of one step whose second action is right.

`python -m tests.learning.lesson learn ...` is `episodic learn` with the fake trainer.
"""

import sys
from pathlib import Path
from typing import Any

import gymnasium

ENV = "tests.learning.lesson:Lesson-v0"
TRAIN = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))


class Lesson(gymnasium.Env[int, int]):
    """Ends after one step. The reward is the action."""

    observation_space = gymnasium.spaces.Discrete(2)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        return 0, float(action), True, False, {"is_success": bool(action)}


if "Lesson-v0" not in gymnasium.registry:
    gymnasium.register("Lesson-v0", entry_point=Lesson, disable_env_checker=True)


def main() -> None:
    from service.loop import training

    training.COMMAND = TRAIN
    from service.cli.main import app

    app()


if __name__ == "__main__":
    main()
