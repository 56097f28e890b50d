"""One training run, from an export to an adapter.

While it runs, its files are in the folder OUT.partial: the checkpoint, and the export if it came from a service. OUT
itself appears when everything in it is complete. Then OUT.partial is removed.
"""

import json
import os.path
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from service.files import complete_file
from service.filters import EpisodeFilter
from service.learning import TrainingDiverged, TrainingRefused, adapter, checks
from service.learning.card import as_text, check_same, make_card, read_card, rounded, summary
from service.learning.options import Device, Options
from service.learning.partial import CHECKPOINT, EXPORT, RUN, clear, partial_folder, working_folder
from service.learning.rehearsal import read_rehearsal
from service.learning.segments import Json
from service.learning.selection import select
from service.learning.trainer import Progress, Trainer, difference
from service.learning.trajectories import Data, freeze, never, read
from service.learning.units import Selection

MAX_DIFFERENCE = 0.05
"""Above this mean difference of stored and recomputed log-probabilities, the run warns."""

_NUM_COMPARED = 64
"""Number of units whose stored log-probabilities are compared before the first step."""

Source = Path | Callable[[], Iterable[Json]]
"""An export: a file, or a function that yields its trajectories."""


class Watcher(Protocol):
    """Receives what happens in a run."""

    def phase(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def step(self, progress: Progress) -> None: ...


class Silent:
    """A watcher that does nothing."""

    def phase(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

    def step(self, progress: Progress) -> None: ...


@dataclass(frozen=True, slots=True)
class Base:
    """The model to train an adapter for.

    path: its folder, or its Hugging Face id.
    name: for the card and the adapter's configuration.
    digests: file with digests of weights; see `weights_version`.
    adapter: folder of the adapter to start from; None for a new one.
    """

    path: str
    name: str
    digests: Path | None = None
    adapter: Path | None = None


def train(
    options: Options,
    source: Source,
    base: Base,
    out: Path,
    *,
    where: EpisodeFilter | None = None,
    rehearse: Path | None = None,
    resume: bool = False,
    device: Device = "auto",
    checkpoint_every: int = 50,
    watcher: Watcher | None = None,
    should_stop: Callable[[], bool] = never,
) -> dict[str, Any]:
    """Trains an adapter, writes it to the folder `out`, and returns its card.

    where: filters of the trajectories.
    rehearse: a second export. Its drawn tokens are imitated along, so that the policy does not unlearn them.
    resume: continues an unfinished run, if there is one. If `out` is complete already, returns its card. Options, data
        and base model must be those of the start.
    should_stop: asked after each trajectory and each optimizer step.

    Raises TrainingRefused, TrainingInterrupted after `should_stop`, and whatever a function as `source` raises.
    """
    adapter.peft()
    options, work = adapter.sized(options, base.adapter), partial_folder(out)
    run = _Run(options, base, out, work, where or EpisodeFilter(), rehearse, watcher or Silent(), should_stop)
    if os.path.exists(out):  # Path.exists raises OSError for a name that is too long
        return run.finished(source, resume)
    try:
        with working_folder(out, resume=resume):
            return run.complete(source, adapter.choose_device(device), checkpoint_every)
    except OSError as error:
        raise TrainingRefused(_unwritable(error, work)) from error


def _unwritable(error: OSError, work: Path) -> str:
    text = f"{error.filename or work}: {error.strerror or error}. No incomplete file was left behind."
    is_kept = os.path.exists(work / CHECKPOINT)
    return f"{text} {work} has the last checkpoint: continue with --resume." if is_kept else text


@dataclass(frozen=True, slots=True)
class _Run:
    options: Options
    base: Base
    out: Path
    work: Path
    where: EpisodeFilter
    rehearse: Path | None
    watcher: Watcher
    should_stop: Callable[[], bool]

    def complete(self, source: Source, device: torch.device, checkpoint_every: int) -> dict[str, Any]:
        began = time.monotonic()
        data = self._read(source)
        chosen = select(data.episodes, self.options)
        rehearsal = read_rehearsal(self.rehearse, self.should_stop)
        self.watcher.phase(summary(data, chosen))
        if rehearsal.rows:
            self.watcher.phase(f"rehearsing {rehearsal.num_tokens} tokens of {len(rehearsal.rows)} segments")
        self.watcher.phase(f"loading {self.base.name} on {device}")
        model = adapter.load_base(self.base.path, self.options, device)
        versions = checks.versions(model, self.base.path, self.base.digests, self.base.adapter)
        checks.check_versions(chosen, data.episodes, versions, self.options)
        checks.check_vocabulary(model, [*chosen.rows, *rehearsal.rows])
        trainer = Trainer(self._with_adapter(model), chosen.units, self.options, device, rehearsal.rows)
        metrics = {"start": self._prepare(trainer, chosen)}
        for warning in chosen.warnings:
            self.watcher.warn(warning)
        started = checks.fingerprint(self.options, self.where, data.digest, versions)
        self._begin(trainer, {**started, "rehearsal": rehearsal.digest})
        self._take_steps(trainer, checkpoint_every)
        files = adapter.files_of(trainer.model)
        card = make_card(
            options=self.options,
            base_name=self.base.name,
            versions=versions,
            policy_version=adapter.version_of(files, versions.base),
            data=data,
            where=self.where,
            chosen=chosen,
            rehearsal=rehearsal,
            metrics={
                **metrics,
                "epochs": [rounded(figures) for figures in trainer.state.epochs],
                "steps": trainer.num_steps,
                "seconds": round(time.monotonic() - began, 1),
            },
            device=str(device),
        )
        adapter.write_folder(self.out, {**files, adapter.CARD: json.dumps(card, indent=2).encode() + b"\n"})
        clear(self.work)
        return card

    def finished(self, source: Source, resume: bool) -> dict[str, Any]:
        """Returns the card of `out`, which is complete. Data from a service is not compared: it was a snapshot."""
        path = self.out / adapter.CARD
        if not resume or not path.is_file():
            raise TrainingRefused(f"{self.out} exists already. Choose another folder for --out.")
        card, trained = read_card(path)
        initial = self.base.adapter
        wanted = {
            **self.options.as_json(),
            "base model": self.base.name,
            "filters": as_text(self.where),
            "rehearsal": read_rehearsal(self.rehearse, self.should_stop).as_json(),
            "initial": adapter.version_of(adapter.read_files(initial), trained["base"]) if initial else trained["base"],
        }
        if isinstance(source, Path):
            wanted["data"] = f"sha256:{self._read(source).digest}"
        check_same(self.out, trained, wanted)
        clear(self.work)
        return card

    def _take_steps(self, trainer: Trainer, checkpoint_every: int) -> None:
        try:
            trainer.run(
                checkpoint=self.work / CHECKPOINT,
                every=checkpoint_every,
                on_step=self.watcher.step,
                should_stop=self.should_stop,
            )
        except TrainingDiverged:
            clear(self.work)  # with the same options, the next step would fail again
            raise

    def _read(self, source: Source) -> Data:
        """Reads the data. An export is first written to a file, so that a run that continues has the same data."""
        if isinstance(source, Path):
            return read(source, self.where, self.should_stop)
        path = self.work / EXPORT
        if not (self.work / CHECKPOINT).exists():
            self.watcher.phase("exporting trajectories")
            freeze(source(), path, self.should_stop)
        return read(path, self.where, self.should_stop)

    def _with_adapter(self, base: Any) -> Any:
        torch.manual_seed(self.options.seed)  # pyright: ignore[reportUnknownMemberType] - a new adapter is random
        if self.base.adapter is not None:
            return adapter.load_adapter(base, self.base.adapter, self.base.name)
        return adapter.new_adapter(base, self.options, self.base.name)

    def _prepare(self, trainer: Trainer, chosen: Selection) -> dict[str, float | None]:
        """Compares the stored log-probabilities with the initial policy's, and computes those of the reference."""
        units = chosen.units[:_NUM_COMPARED]
        scored = [values for of_unit in trainer.score(units) for values in of_unit]
        gap = difference([example.row for unit in units for example in unit], scored)
        if gap is not None and gap > MAX_DIFFERENCE:
            chosen.warnings.append(
                f"the stored log-probabilities differ from those of the initial policy by {gap:.3f} on average (more "
                f"than {MAX_DIFFERENCE}): another policy acted, or the numbers of the engine are too coarse"
            )
        trainer.prepare()
        return {"mean_abs_delta_logprob": gap and float(f"{gap:.4g}")}

    def _begin(self, trainer: Trainer, fingerprint: Mapping[str, Any]) -> None:
        """Continues from the checkpoint, or writes down what this run is started with."""
        if (self.work / CHECKPOINT).exists():
            checks.check_fingerprint(self.work / RUN, fingerprint)
            trainer.restore(self.work / CHECKPOINT)
            self.watcher.phase(f"continuing after step {trainer.state.step} of {trainer.num_steps}")
        else:
            with complete_file(self.work / RUN) as file:
                file.write(json.dumps(fingerprint).encode())
