"""What a learning run does: its options, and the seeds that it plays."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal

from service.learning.options import LEARNING_RATES, Method
from service.loop import LearningFailed

Metric = Literal["auto", "completion", "return"]

_MAX_SEED = 2**31


@dataclass(frozen=True, slots=True)
class Plan:
    """What determines a learning run, beside the service and its policy.

    name: the alias that is moved to better versions.
    env_kwargs: arguments of the environment in training; `test_kwargs` are those in selection and in the final test.
    seeds, repeat: number of seeds in each training rollout, and of plays of each seed.
    temperature, last_temperature: of the first training rollout and of the last. None: all have the first.
    learning_rate: of the first round. None: the method's default.
    selection: number of seeds that compare a candidate with the best policy so far.
    final: number of seeds in the final test.
    train_seed, selection_seed, final_seed: the first seed of each range.
    patience: stop after this many rounds in a row without a better policy.
    metric: what policies are compared by. `auto` is the completion if the success of all episodes is known.
    train_args: further arguments of `episodic train`.
    """

    env: str
    name: str
    env_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    test_kwargs: Mapping[str, Any] | None = None
    max_episode_steps: int | None = None
    describe: str | None = None
    instructions: str | None = None
    success_at: float | None = None
    rounds: int = 5
    patience: int = 2
    seeds: int = 200
    repeat: int = 8
    temperature: float = 1.0
    last_temperature: float | None = None
    learning_rate: float | None = None
    selection: int = 200
    final: int = 500
    train_seed: int = 0
    selection_seed: int = 1_000_000_000
    final_seed: int = 2_000_000_000
    metric: Metric = "auto"
    method: Method = "grpo"
    seed: int = 0
    train_args: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "train_args": list(self.train_args)}

    def ranges(self) -> dict[str, range]:
        """The seeds of all training rollouts, of all selections, and of the final test.

        Raises LearningFailed if two ranges share a seed, or if a seed is too large.
        """
        found = {
            "training": range(self.train_seed, self.train_seed + self.rounds * self.seeds),
            "selection": range(self.selection_seed, self.selection_seed + self.rounds * self.selection),
            "final": range(self.final_seed, self.final_seed + self.final),
        }
        for (one, first), (other, second) in combinations(found.items(), 2):
            if first.start < second.stop and second.start < first.stop:
                raise LearningFailed(
                    f"the seeds for {one} ({_shown(first)}) and for {other} ({_shown(second)}) overlap. Change "
                    "--train-seed, --selection-seed or --final-seed: a policy must be tested on other seeds than it "
                    "was trained or chosen on."
                )
        if max(seeds.stop for seeds in found.values()) > _MAX_SEED:
            raise LearningFailed(f"the last seed must be below {_MAX_SEED}. Choose smaller first seeds.")
        return found

    def temperature_in(self, number: int) -> float:
        """The sampling temperature of a round. It changes by the same factor from each round to the next."""
        if self.last_temperature is None or self.rounds == 1:
            return self.temperature
        return self.temperature * (self.last_temperature / self.temperature) ** ((number - 1) / (self.rounds - 1))

    def learning_rate_in(self, number: int) -> float:
        """The learning rate of a round, proportional to the temperature.

        Probabilities depend on logits / temperature: at a lower temperature, equal steps change the policy more.
        """
        first = LEARNING_RATES[self.method] if self.learning_rate is None else self.learning_rate
        return first * self.temperature_in(number) / self.temperature if self.temperature else first

    def training_seeds(self, number: int) -> range:
        """The training seeds of a round. Rounds count from 1."""
        first = self.train_seed + (number - 1) * self.seeds
        return range(first, first + self.seeds)

    def selection_seeds(self, number: int) -> range:
        """The selection seeds of a round."""
        first = self.selection_seed + (number - 1) * self.selection
        return range(first, first + self.selection)

    @property
    def final_seeds(self) -> range:
        return range(self.final_seed, self.final_seed + self.final)


def _shown(seeds: range) -> str:
    return f"{seeds.start} to {seeds.stop - 1}"
