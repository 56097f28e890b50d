"""Trains LoRA adapters on exported trajectories. Programs call `run.train`, people `episodic train`.

* `options`: what can be set
* `trajectories`, `segments`, `schema`: read an export and check it
* `selection`: chooses the tokens to train on, by `imitation` (bc), `pairs` (dpo) or `advantages` (grpo), as `units`
* `likelihood`: the log-probability of tokens under the policy, as the service defines it
* `losses`: behaviour cloning, DPO and GRPO, all on this log-probability
* `rehearsal`: a second export, which is imitated along
* `trainer`, `batches`: optimizer steps, checkpoints, and parts of a batch that fit into memory
* `adapter`: the base model, the LoRA adapter, and the folder that is written
* `partial`: the folder of an unfinished run
* `card`: what an adapter was trained from
* `run`: puts everything together

Training runs in a process of its own, never in that of the service. `likelihood`, `losses`, `trainer`, `adapter` and
`run` import torch, so a command imports them inside its function.
"""

NOTHING_TO_LEARN = 3
"""The exit code of `episodic train` for `NothingToLearn`."""


NEEDS_PEFT = "training needs the package peft. Install it with: pip install 'episodic[train]'"


class TrainingRefused(Exception):
    """The training cannot start or go on. The message says why, and what to do."""


class NothingToLearn(TrainingRefused):
    """The episodes contain nothing that the method can learn from, for example no successes."""


class TrainingDiverged(TrainingRefused):
    """A gradient was not finite. The run cannot go on from its checkpoint."""


class TrainingInterrupted(Exception):
    """The training was asked to stop. A checkpoint has been written, if the first step was reached."""
