"""The rounds of a learning run, and its final test."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from service.client import Client
from service.loop import playing, policies, report, state, training
from service.loop.plan import Plan
from service.loop.playing import Service
from service.loop.state import Phase, Result, Round, State
from service.rollout import EnvironmentFactory, Run

EXPORT, ADAPTER = "trajectories.ndjson", "adapter"


class Watcher(Protocol):
    """Receives what happens in a run."""

    def started(self, state: State) -> None:
        """Called once, also if a run continues."""

    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def training(self, line: str) -> None: ...

    def changed(self, state: State) -> None:
        """Called after each phase."""


class Silent:
    """A watcher that does nothing."""

    def started(self, state: State) -> None: ...

    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def training(self, line: str) -> None: ...

    def changed(self, state: State) -> None: ...


def learn(
    plan: Plan,
    service: Service,
    out: Path,
    *,
    watcher: Watcher | None = None,
    train_command: Sequence[str] = training.COMMAND,
) -> Result:
    """Plays all rounds and the final test, and returns the report. The folder `out` keeps what was done.

    A run that was cut continues: completed phases are not repeated. The phase that was cut is repeated, with a new run
    id if it is a rollout; a training goes on from its checkpoint.

    Raises LearningFailed, EpisodicError, UnusableEnvironment, EpisodeRefused.
    """
    plan.ranges()  # reports overlaps before the service is called
    in_training, in_tests = playing.factories(plan)
    with state.locked(out), service.client() as client:
        found = state.load(out, plan)
        if found is None:
            found = _begun(plan, client, out)
        elif found.final is None:
            policies.check_rights(client, plan.name)
            policies.check_base(client, found.base)
        loop = _Loop(plan, service, client, found, in_training, in_tests, watcher or Silent(), train_command)
        loop.watcher.started(found)
        loop.all_rounds()
        loop.final_test()
        return report.complete(found)


def _begun(plan: Plan, client: Client, out: Path) -> State:
    policies.check_rights(client, plan.name)
    policies.check_unused(client, plan.name)
    seeds = {name: [of.start, of.stop] for name, of in plan.ranges().items()}
    begun = State(out, plan.as_json(), seeds, policies.base_of(client))
    begun.save()
    return begun


@dataclass(frozen=True, slots=True)
class _Loop:
    plan: Plan
    service: Service
    client: Client
    state: State
    in_training: EnvironmentFactory
    in_tests: EnvironmentFactory
    watcher: Watcher
    train_command: Sequence[str]

    def all_rounds(self) -> None:
        for number in range(1, self.plan.rounds + 1):
            if number > len(self.state.rounds) and self.state.since_best >= self.plan.patience:
                return
            self._round(self.state.current(number))

    def _round(self, played: Round) -> None:
        phases: dict[Phase, Callable[[Round], Result]] = {
            "rollout": self._roll_out,
            "export": self._export,
            "train": self._train,
            "load": self._load,
            "select": self._select,
            "decide": self._decide,
        }
        for name, phase in phases.items():
            if name in played.phases or played.is_complete:
                continue
            with self._timed(f"round {played.number}: {name}"):
                played.phases[name] = phase(played)

    @contextmanager
    def _timed(self, text: str) -> Generator[None]:
        began = time.monotonic()
        self.state.phase = text
        self.state.save()
        self.watcher.phase(text)
        yield
        self.state.seconds = round(self.state.seconds + time.monotonic() - began, 1)
        self.state.save()
        self.watcher.changed(self.state)

    def _roll_out(self, played: Round) -> Result:
        learner = self.state.learner.policy
        run = self._run(f"round-{played.number}", learner, self.plan.temperature_in(played.number))
        seeds = self.plan.training_seeds(played.number)
        (made,) = playing.play(
            self.service, self.in_training, [run], seeds, self.plan.repeat, on_progress=self.watcher.progress
        )
        return {"policy": learner, "seeds": [seeds.start, seeds.stop], **playing.played(made)}

    def _export(self, played: Round) -> Result:
        path = self.state.folder(played) / EXPORT
        count = playing.export(self.client, played.phases["rollout"]["tag"], path)
        return {"file": str(path.relative_to(self.state.out)), "trajectories": count}

    def _train(self, played: Round) -> Result:
        folder = self.state.folder(played)
        adapter, initial = folder / ADAPTER, self.state.learner.adapter
        seed, rate = self.plan.seed + played.number, self.plan.learning_rate_in(played.number)
        arguments = ["--method", self.plan.method, "--seed", str(seed), "--learning-rate", str(rate)]
        arguments += self.plan.train_args
        arguments += ["--from", str(folder / EXPORT), "--out", str(adapter)]
        arguments += [] if initial is None else ["--init-adapter", str(initial)]
        try:
            card = training.train(self.train_command, arguments, folder, self.watcher.training)
        except training.NoCandidate as error:
            return {"refused": str(error)}
        last = card["metrics"]["epochs"][-1]
        own = {"steps": card["metrics"]["steps"], "seconds": card["metrics"]["seconds"], "last_epoch": last}
        relative = str(adapter.relative_to(self.state.out))
        return {"adapter": relative, "policy_version": card["policy_version"], "seed": seed, **own}

    def _load(self, played: Round) -> Result:
        learner = self.state.learner
        parent = learner.policy if learner.round else None
        adapter = self.state.out / played.phases["train"]["adapter"]
        return policies.load(self.client, self.plan.name, adapter, parent, played.number)

    def _select(self, played: Round) -> Result:
        seeds = self.plan.selection_seeds(played.number)
        candidate = played.phases["load"]["version"]
        return self._compare(f"selection-{played.number}", candidate, self.state.best.policy, seeds)

    def _decide(self, played: Round) -> Result:
        found, version = played.phases["select"], played.phases["load"]["version"]
        is_better = found["verdict"] == "better"
        policies.decide(self.client, self.plan.name, version, found, is_better=is_better)
        return {"promoted": is_better}

    def final_test(self) -> None:
        """Compares the best policy with the base model, once, on seeds that were used for nothing else."""
        best = self.state.best
        if self.state.final is None and best.round:
            with self._timed("final test"):
                self.state.final = self._compare("final", best.policy, self.state.base["name"], self.plan.final_seeds)

    def _compare(self, label: str, candidate: str, baseline: str, seeds: range) -> Result:
        """Lets two policies play the same seeds greedily, side by side."""
        runs = [self._run(label, policy, 0.0) for policy in (candidate, baseline)]
        made = playing.play(self.service, self.in_tests, runs, seeds, on_progress=self.watcher.progress)
        found, before = (playing.outcomes(self.client, run.tag) for run in runs)
        shown = {"policies": [candidate, baseline], "seeds": [seeds.start, seeds.stop]}
        rollouts = [{"run_id": one.run_id, "policy_version": one.policy_version} for one in made]
        return {**shown, "rollouts": rollouts, **playing.compare(found, before, self.plan.metric)}

    def _run(self, label: str, policy: str, temperature: float) -> Run:
        tags = (f"learn:{self.plan.name}", label)
        return Run(
            tags=tags,
            policy=policy,
            instructions=self.plan.instructions,
            temperature=temperature,
            success_at=self.plan.success_at,
        )


def describe_final(final: Any) -> str:
    """The final test in a sentence."""
    best, base = final["candidate"], final["baseline"]
    return (
        f"{final['metric']} {report.interval(best)} against {report.interval(base)} of the base model on "
        f"{final['pairs']} seeds used for nothing else: {report.delta(final)}, p = {report.p_value(final['p'])}, "
        f"{final['verdict']}"
    )
