"""The training loop: batches in an order that the seed determines, an optimizer, checkpoints, and figures."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.files import complete_file
from service.learning import TrainingDiverged, TrainingInterrupted, TrainingRefused
from service.learning.adapter import set_weights, weights_of
from service.learning.batches import loss_size, parts
from service.learning.likelihood import collate, token_logprobs
from service.learning.losses import LOSSES, Tokens
from service.learning.options import Options
from service.learning.segments import Floats, Kind, Row
from service.learning.units import Example, Unit

Figures = dict[str, float]


@dataclass(slots=True)
class Sums:
    """Sums of the figures of several optimizer steps, and how many steps, tokens and units they are over."""

    sums: Figures = field(default_factory=dict[str, float])
    steps: int = 0
    tokens: int = 0
    units: int = 0

    def add(self, name: str, value: float) -> None:
        old = self.sums.get(name, 0.0)
        self.sums[name] = max(old, value) if name.endswith("_max") else old + value

    def means(self) -> Figures:
        drawn = self.sums.get("num_drawn", 0.0)
        of_steps = dict.fromkeys(("loss", "rehearsal_loss", "grad_norm"), self.steps)
        sizes = {**of_steps, "ratio": drawn, "kl": drawn}
        found: Figures = {}
        for name, value in self.sums.items():
            size = self.units if name.startswith("pair_") else sizes.get(name, self.tokens)
            if name.endswith("_max"):
                found[name] = value
            elif name != "num_drawn" and size:
                found[name] = value / size
        return found


@dataclass(frozen=True, slots=True)
class Progress:
    """The state after an optimizer step.

    epoch: from 0.
    figures: of this step.
    num_tokens: of the segments of this step, without padding.
    """

    step: int
    num_steps: int
    epoch: int
    figures: Figures
    num_tokens: int
    tokens_per_s: float


@dataclass(slots=True)
class State:
    """What a checkpoint keeps beside weights, optimizer and random numbers.

    step: number of optimizer steps taken. It determines the place in the data.
    epochs: mean figures of each complete epoch.
    """

    step: int = 0
    epochs: list[Figures] = field(default_factory=list[Figures])
    epoch: Sums = field(default_factory=Sums)


class Trainer:
    """Trains the adapter of a PEFT model on the units.

    Every place in the data follows from the seed and the number of the optimizer step. A run that continues from a
    checkpoint therefore takes the same steps as an unbroken one.

    rehearsed: rows whose trained tokens each step imitates along, a quarter as many as it takes units.
    """

    def __init__(
        self,
        model: Any,
        units: Sequence[Unit],
        options: Options,
        device: torch.device,
        rehearsed: Sequence[Row] = (),
    ) -> None:
        self.model = model
        self.state = State()
        self._base: Any = model.get_base_model()
        self._units = units
        self._rehearsed = [(Example(row, np.ones(len(row.positions), np.float32)),) for row in rehearsed]
        self._options = options
        self._device = device
        self._parameters: list[Tensor] = [value for value in model.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=options.learning_rate, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: min(1.0, (step + 1) / max(1, options.warmup_steps))
        )
        self._references: list[list[Floats]] | None = None
        self._base.eval()  # there is no dropout

    @property
    def num_steps(self) -> int:
        return self._options.epochs * self._steps_per_epoch

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self._units) // self._options.batch_size)

    def prepare(self) -> None:
        """Computes the log-probabilities of the reference policy, if the loss needs them. Called before any training,
        and before a checkpoint is restored."""
        options = self._options
        if options.method == "bc" or (options.method == "grpo" and not options.kl):
            return
        if options.reference == "initial":
            self._references = self.score(self._units)
            return
        with self.model.disable_adapter():
            self._references = self.score(self._units)

    @torch.no_grad()
    def score(self, units: Sequence[Unit]) -> list[list[Floats]]:
        """Returns the log-probabilities of the trained tokens of each example of each unit."""
        found: list[list[Floats]] = [[] for _ in units]
        for part in parts(units, range(len(units)), self._options.max_batch_tokens):
            rows = [example.row for index in part for example in units[index]]
            values = token_logprobs(self._base, collate(rows, self._device)).cpu().numpy()
            split = iter(np.split(values, np.cumsum([len(row.positions) for row in rows])[:-1]))
            for index in part:
                found[index] = [next(split) for _ in units[index]]
        return found

    def run(
        self,
        *,
        checkpoint: Path | None = None,
        every: int = 50,
        on_step: Callable[[Progress], None] = lambda _: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Takes the remaining optimizer steps.

        checkpoint: file to which the state is written after `every` steps, after each epoch, and if `should_stop` is
        true after a step.

        Raises TrainingInterrupted after `should_stop`, and OSError if a checkpoint cannot be written.
        """
        while self.state.step < self.num_steps:
            on_step(self.step())
            is_epoch = self.state.step % self._steps_per_epoch == 0
            if is_epoch:
                self.state.epochs.append(self.state.epoch.means())
                self.state.epoch = Sums()
            stops = should_stop() and self.state.step < self.num_steps
            if checkpoint is not None and (stops or is_epoch or self.state.step % every == 0):
                self.write(checkpoint)
            if stops:
                raise TrainingInterrupted

    def step(self) -> Progress:
        """Takes the next optimizer step. Raises TrainingDiverged if its gradient is not finite."""
        began = time.monotonic()
        batch, sums = self._batch(), Sums()
        sums.steps = 1
        size = loss_size(batch, self._units, self._options)
        for part in parts(self._units, batch, self._options.max_batch_tokens):
            self._accumulate(part, size, sums)
        if self._rehearsed:
            self._rehearse(sums)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._options.max_grad_norm)
        if not torch.isfinite(norm):
            raise TrainingDiverged(
                f"the gradient of step {self.state.step + 1} is not finite. Nothing of this training was kept. Train "
                "again with a lower --learning-rate, and check the data."
            )
        sums.add("grad_norm", float(norm))
        self._optimizer.step()  # pyright: ignore[reportUnknownMemberType] - torch's types are incomplete
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self._count(sums)
        num_tokens = sum(example.row.length for index in batch for example in self._units[index])
        epoch = (self.state.step - 1) // self._steps_per_epoch
        speed = num_tokens / max(time.monotonic() - began, 1e-9)
        return Progress(self.state.step, self.num_steps, epoch, sums.means(), num_tokens, speed)

    def _batch(self) -> list[int]:
        """The indices of the units of the next step."""
        return self._chosen(len(self._units), self._options.batch_size)

    def _chosen(self, num: int, batch_size: int) -> list[int]:
        """The indices of the next step among `num`. Each pass over them has a new order."""
        num_passes, place = divmod(self.state.step, -(-num // batch_size))
        order = np.random.default_rng([self._options.seed, num_passes]).permutation(num)
        first = place * batch_size
        return order[first : first + batch_size].tolist()

    def _accumulate(self, part: Sequence[int], size: float, sums: Sums) -> None:
        """Adds the gradient of a part of the batch."""
        examples = [example for index in part for example in self._units[index]]
        logprobs = token_logprobs(self._base, collate([example.row for example in examples], self._device))
        tokens = self._tokens(part, examples, logprobs)
        loss, metrics = LOSSES[self._options.method](tokens, self._options)
        (loss / size).backward()  # pyright: ignore[reportUnknownMemberType]
        sums.tokens += len(logprobs)
        sums.units += len(part)
        found = {"loss": loss.detach() / size, **metrics}
        values = torch.stack([value.float() for value in found.values()]).cpu()  # one transfer from a GPU
        for name, value in zip(found, values, strict=True):
            sums.add(name, float(value))

    def _rehearse(self, sums: Sums) -> None:
        """Adds the gradient of the mean negative log-likelihood of a batch of rehearsed rows."""
        indices = self._chosen(len(self._rehearsed), max(1, self._options.batch_size // 4))
        size = sum(len(example.weights) for index in indices for example in self._rehearsed[index])
        for part in parts(self._rehearsed, indices, self._options.max_batch_tokens):
            rows = [example.row for index in part for example in self._rehearsed[index]]
            loss = -token_logprobs(self._base, collate(rows, self._device)).sum() / size
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            sums.add("rehearsal_loss", float(loss.detach()))

    def _tokens(self, part: Sequence[int], examples: Sequence[Example], logprobs: Tensor) -> Tokens:
        sizes = [sum(len(example.row.positions) for example in self._units[index]) for index in part]
        references = self._references and [values for index in part for values in self._references[index]]
        return Tokens(
            logprobs=logprobs,
            behaviour=self._joined([example.row.logprobs for example in examples]),
            reference=self._joined(references) if references else None,
            weights=self._joined([example.weights for example in examples]),
            drawn=self._joined([example.row.kinds != Kind.RECORDED for example in examples]),
            unit=self._joined([np.repeat(np.arange(len(part)), sizes)]),
            num_units=len(part),
        )

    def _joined(self, arrays: Sequence[Any]) -> Tensor:
        return torch.as_tensor(np.concatenate(arrays), device=self._device)

    def _count(self, sums: Sums) -> None:
        epoch = self.state.epoch
        for name, value in sums.sums.items():
            epoch.add(name, value)
        epoch.steps, epoch.tokens, epoch.units = (
            epoch.steps + sums.steps,
            epoch.tokens + sums.tokens,
            epoch.units + sums.units,
        )

    def write(self, checkpoint: Path) -> None:
        """Writes everything that the next step depends on. The file is replaced as a whole. Raises OSError."""
        epoch = self.state.epoch
        buffer = io.BytesIO()  # torch reports a full disk as a RuntimeError, without the reason
        torch.save(
            {
                "weights": weights_of(self.model),
                "optimizer": self._optimizer.state_dict(),
                "schedule": {"last_epoch": self._schedule.last_epoch},
                "step": self.state.step,
                "epochs": self.state.epochs,
                "epoch": {"sums": epoch.sums, "steps": epoch.steps, "tokens": epoch.tokens, "units": epoch.units},
                "random": torch.get_rng_state(),
            },
            buffer,
        )
        with complete_file(checkpoint) as file:
            file.write(buffer.getvalue())

    def restore(self, checkpoint: Path) -> None:
        """Continues from a checkpoint. Raises TrainingRefused if it cannot be read."""
        try:
            saved: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
            set_weights(self.model, saved["weights"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self._schedule.last_epoch = saved["schedule"]["last_epoch"]
            torch.set_rng_state(saved["random"])
            self.state = State(saved["step"], saved["epochs"], Sums(**saved["epoch"]))
        except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, UnpicklingError) as error:
            raise TrainingRefused(
                f"the checkpoint {checkpoint} cannot be used: {error}. Remove {checkpoint.parent}."
            ) from error


def difference(rows: Sequence[Row], scored: Sequence[Floats]) -> float | None:
    """The mean absolute difference of the stored log-probabilities and those that the trainer computes.

    None if no token was drawn from a known distribution.
    """
    pairs = [(row.kinds <= Kind.ALL, row.logprobs, values) for row, values in zip(rows, scored, strict=True)]
    gaps = np.concatenate([np.abs(stored - values)[known] for known, stored, values in pairs])
    return float(gaps.mean()) if gaps.size else None
