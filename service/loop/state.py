"""What a learning run has done so far. It is written to a file after each phase, so that a killed run continues."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from service.files import complete_file, exclusive
from service.loop import LearningFailed
from service.loop.plan import Plan

Phase = Literal["rollout", "export", "train", "load", "select", "decide"]
"""The phases of a round, in this order. A round without a candidate ends with `train`."""

Result = dict[str, Any]

STATE = "state.json"


@dataclass(slots=True)
class Round:
    """A round: the result of each completed phase, by name."""

    number: int
    phases: dict[str, Result] = field(default_factory=dict[str, Result])

    @property
    def refusal(self) -> str | None:
        """Why there was nothing to train on, if so."""
        return self.phases.get("train", {}).get("refused")

    @property
    def is_complete(self) -> bool:
        return self.is_compared or self.refusal is not None

    @property
    def is_compared(self) -> bool:
        return "decide" in self.phases

    @property
    def is_worse(self) -> bool:
        return self.phases["select"]["verdict"] == "worse"

    @property
    def is_promoted(self) -> bool:
        return self.phases.get("decide", {}).get("promoted", False)


@dataclass(frozen=True, slots=True)
class Learned:
    """A policy of the run. `round` is 0 and `adapter` None for the base model."""

    policy: str
    round: int = 0
    adapter: Path | None = None


@dataclass(slots=True)
class State:
    """The state of a run in the folder `out`.

    base: name and version of the base model.
    phase: what is being done, such as "round 2: train".
    seconds: time spent in completed phases.
    """

    out: Path
    plan: Result
    seeds: dict[str, list[int]]
    base: Result
    rounds: list[Round] = field(default_factory=list[Round])
    final: Result | None = None
    phase: str = ""
    seconds: float = 0.0

    @property
    def best(self) -> Learned:
        """The candidate that was found better last."""
        return self._learned([played for played in self.rounds if played.is_promoted])

    @property
    def learner(self) -> Learned:
        """The policy that the next round plays and trains: the last candidate that was not worse than the best policy.

        Several candidates that are each a little better, and not known to be, thus add up to one that is.
        """
        return self._learned([played for played in self.rounds if played.is_compared and not played.is_worse])

    def _learned(self, rounds: Sequence[Round]) -> Learned:
        """The candidate of the last of these rounds, or the base model."""
        if not rounds:
            return Learned(self.base["name"])
        last = rounds[-1]
        return Learned(last.phases["load"]["version"], last.number, self.out / last.phases["train"]["adapter"])

    @property
    def since_best(self) -> int:
        """The number of complete rounds since the last one that found a better policy."""
        complete = [played for played in self.rounds if played.is_complete]
        return len(complete) - self.best.round

    def current(self, number: int) -> Round:
        """The round with this number, which is the last one or the next one."""
        if len(self.rounds) < number:
            self.rounds.append(Round(number))
        return self.rounds[number - 1]

    def folder(self, played: Round) -> Path:
        path = self.out / f"round-{played.number}"
        path.mkdir(exist_ok=True)
        return path

    def as_json(self) -> Result:
        rounds = [{"round": played.number, **played.phases} for played in self.rounds]
        own = {name: getattr(self, name) for name in ("plan", "seeds", "base", "phase", "seconds", "final")}
        return {"format": 1, **own, "rounds": rounds}

    def save(self) -> None:
        write(self.out / STATE, self.as_json())


def load(out: Path, plan: Plan) -> State | None:
    """The state in a folder, or None if there is none. Raises LearningFailed if it is that of another plan."""
    try:
        stored: Result = json.loads((out / STATE).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise LearningFailed(f"{out / STATE} is damaged ({error}). Choose another folder for --out.") from error
    wanted = json.loads(json.dumps(plan.as_json()))
    if changed := [name for name in wanted if stored["plan"].get(name) != wanted[name]]:
        was = ", ".join(f"{name} was {stored['plan'].get(name)!r}, now {wanted[name]!r}" for name in changed)
        raise LearningFailed(
            f"the run in {out} was started with other options ({was}). Use those, or another folder for --out."
        )
    rounds = [Round(entry.pop("round"), entry) for entry in stored["rounds"]]
    own = {name: stored[name] for name in ("plan", "seeds", "base", "phase", "seconds", "final")}
    return State(out=out, rounds=rounds, **own)


def write(path: Path, document: Result) -> None:
    """Writes JSON to a file, which has either its old or its new content after a crash."""
    with complete_file(path) as file:
        file.write(json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")


@contextmanager
def locked(out: Path) -> Generator[None]:
    """Makes sure that only one process works in the folder. Raises LearningFailed if another one does."""
    out.mkdir(parents=True, exist_ok=True)
    busy = LearningFailed(f"another process is learning in {out}. Wait for it, or choose another --out.")
    with exclusive(out / "lock", busy):
        yield
