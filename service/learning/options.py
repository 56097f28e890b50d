"""The options of a training run."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Method = Literal["bc", "dpo", "grpo"]
Score = Literal["return", "rating"]
Reference = Literal["base", "initial"]
GroupBy = Literal["seed", "start"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]

LEARNING_RATES: dict[Method, float] = {"bc": 1e-3, "dpo": 3e-4, "grpo": 5e-4}
"""The default learning rate of each method, for LoRA on the packaged policy."""

RANK, ALPHA = 8, 16
MAX_LEARNING_RATE = 1.0
MAX_SEED = 2**32 - 1

USED_BY: dict[str, tuple[Method, ...]] = {
    "--keep": ("bc",),
    "--score": ("dpo",),
    "--beta": ("dpo",),
    "--reference": ("dpo", "grpo"),
    "--clip": ("grpo",),
    "--discount": ("grpo",),
    "--max-ratio": ("grpo",),
    "--kl": ("grpo",),
    "--allow-filtered": ("grpo",),
}
"""The methods that use an option of `episodic train`. Every method uses the options that are not listed here."""


def unused(method: Method, given: Iterable[str]) -> str | None:
    """Says which of the given options the method does not use. Returns None if it uses all of them."""
    others = {option: USED_BY[option] for option in given if option in USED_BY and method not in USED_BY[option]}
    found = [f"{option} belongs to --method {' and '.join(methods)}" for option, methods in others.items()]
    return f"{', '.join(found)}, but the method is {method}" if found else None


@dataclass(frozen=True, slots=True)
class Options:
    """What determines the result, beside the data, the base model and the initial adapter.

    keep: which tokens behaviour cloning imitates; see `imitation.parse_keep`.
    score: what DPO compares the episodes of a group by.
    reference: the policy that DPO and the KL term compare with: the base model, or the initial adapter.
    beta: DPO's inverse temperature.
    group_by: which episodes are compared; see `units.groups`.
    discount: GRPO scores each step by the discounted return from it on. None: by the return of its episode.
    clip: GRPO keeps the probability ratio within 1 - clip and 1 + clip.
    max_ratio: GRPO truncates the importance weight of a token's gradient, the probability ratio, at this value.
    kl: weight of GRPO's KL term.
    rank, alpha: of the LoRA adapter. None: those of the initial adapter, or RANK and ALPHA for a new one.
    batch_size: number of segments (bc, grpo) or pairs (dpo) in one optimizer step.
    max_batch_tokens: a batch is computed in parts of at most this number of tokens, padding included.
    """

    method: Method
    keep: tuple[str, ...] = ("success",)
    score: Score = "return"
    reference: Reference = "base"
    beta: float = 0.1
    group_by: GroupBy = "seed"
    discount: float | None = None
    clip: float = 0.2
    max_ratio: float = 3.0
    kl: float = 0.0
    rank: int | None = None
    alpha: int | None = None
    learning_rate: float = 5e-4
    warmup_steps: int = 5
    max_grad_norm: float = 1.0
    epochs: int = 1
    batch_size: int = 32
    max_batch_tokens: int = 4096
    seed: int = 0
    allow_filtered: bool = False
    any_version: bool = False
    dtype: Dtype = "float32"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "keep": list(self.keep)}
