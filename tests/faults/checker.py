"""Owns the verdict: compares what the service keeps of an episode with what its caller was answered. It does no I/O.

The service's word is never taken for anything: an acknowledged step must be there once, as it was answered.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from service.client import Act
from tests.faults.history import Completions, History, Taken

Kind = Literal["loss", "double", "gap", "changed", "tokens", "reward", "retry", "refused", "stuck"]

_SAME = ("action", "text", "logprob", "finish_reason", "reasoning", "action_probs", "policy_version")
_TOLERANCE = 1e-3
"""Logprobs are kept as 32-bit floats, a token's each; an answer has their sum."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What is not as it was acknowledged."""

    kind: Kind
    episode_id: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: episode {self.episode_id}: {self.detail}"


def check(history: History, stored: dict[str, Any], tokens: dict[str, Any]) -> list[Finding]:
    """What differs between `history` and the episode's trajectory in the formats `steps` and `tokens`."""
    found = [*_order(history, stored), *_contents(history, stored), *_rewards(history, stored)]
    if not found:  # tokens are told apart by the steps, so those come first
        found = list(_tokens(history, tokens))
    return [Finding(kind, history.episode_id, detail) for kind, detail in found]


def check_retry(history: History, taken: Taken, again: Act) -> list[Finding]:
    """What differs between an answer and the one that its retry got."""
    different = [name for name in ("step", "done", *_SAME) if getattr(again, name) != getattr(taken.answer, name)]
    if not again.replayed:
        different.append("replayed")
    return [Finding("retry", history.episode_id, f"step {taken.sent.step}: other {', '.join(different)}")] * bool(
        different
    )


def remember(history: History, tokens: dict[str, Any]) -> None:
    """Keeps what was read of the tokens, to hold later readings to it. Only for what `check` passed."""
    history.completions = {**completions(history, tokens), **history.completions}
    history.prefix = _all_tokens(tokens)


def _order(history: History, stored: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    indices = [step["step"] for step in stored["steps"]]
    known = range(len(history.steps))
    for index in known:
        if index not in indices:
            yield "loss", f"step {index} was acknowledged and is gone"
    for index, times in Counter(indices).items():
        if times > 1:
            yield "double", f"step {index} is there {times} times"
        if index not in known:
            yield "double", f"step {index} is there and no call was answered with it"
    if sorted(set(indices)) != list(range(len(set(indices)))) or indices != sorted(indices):
        yield "gap", f"the steps are {indices}"
    for observation, times in Counter(step["observation"] for step in stored["steps"]).items():
        if times > 1:
            yield "double", f"{observation!r} was sent once and taken {times} times"


def _contents(history: History, stored: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    by_index = {step["step"]: step for step in stored["steps"]}
    for index, taken in enumerate(history.steps):
        if taken.answer.step != index:
            yield "double", f"the call for step {index} was answered as step {taken.answer.step}"
        kept = by_index.get(index)
        if kept is None:
            continue
        if kept["observation"] != taken.sent.observation:
            yield "changed", f"step {index} has the observation {kept['observation']!r}"
        for name in _SAME:
            if kept[name] != getattr(taken.answer, name):
                yield "changed", f"step {index}: {name} {getattr(taken.answer, name)!r} is now {kept[name]!r}"
    ended = stored["episode"]["status"] == "ended"
    if ended != history.ended:
        yield "changed", f"ended is {ended}, and was answered as {history.ended}"


def _rewards(history: History, stored: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    kept, sent = stored["episode"]["episode_return"], sum(history.rewards)
    if kept != sent:
        yield "reward", f"the return is {kept}, and {sent} was sent"
    each = [step["reward"] for step in stored["steps"] if step["reward"] is not None]
    if each != history.rewards:
        yield "reward", f"the steps' rewards are {each}, and {history.rewards} were sent"


def _tokens(history: History, tokens: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    runs = _runs(tokens)
    drawn = [taken for taken in history.steps if taken.sent.recorded is None]
    if len(runs) != len(drawn):
        yield "tokens", f"{len(runs)} completions for {len(drawn)} steps of the policy"
        return
    for taken, (ids, logprob) in zip(drawn, runs, strict=True):
        step, answer = taken.sent.step, taken.answer
        num_tokens = answer.usage.completion_tokens if answer.usage else 0
        # Of an action in a list, what follows from the tokens before was not drawn.
        if len(ids) > num_tokens or (len(ids) < num_tokens and history.space != "discrete"):
            yield "tokens", f"step {step} has {len(ids)} drawn tokens of the {num_tokens} in its answer"
        if answer.logprob is None or abs(logprob - answer.logprob) > _TOLERANCE:
            yield "tokens", f"step {step} has the logprob {logprob}, and was answered with {answer.logprob}"
        if history.completions.get(step, ids) != ids:
            yield "tokens", f"step {step} was drawn as {history.completions[step]} and is now {ids}"
    if _all_tokens(tokens)[: len(history.prefix)] != history.prefix:
        yield "tokens", "what was read before is no prefix of what is read now"


def completions(history: History, tokens: dict[str, Any]) -> Completions:
    """What the policy drew, by step. A turn or a terminator stands between any two completions, so each is one run of
    tokens under the loss mask."""
    drawn = [taken.sent.step for taken in history.steps if taken.sent.recorded is None]
    return {step: ids for step, (ids, _) in zip(drawn, _runs(tokens), strict=True)}


def _runs(tokens: dict[str, Any]) -> list[tuple[tuple[int, ...], float]]:
    """The drawn tokens and their summed logprob, a completion each."""
    found: list[tuple[tuple[int, ...], float]] = []
    for segment in tokens["segments"]:
        rows = zip(segment["loss_mask"], segment["token_ids"], segment["logprobs"], strict=True)
        for is_drawn, group in groupby(rows, key=lambda row: row[0]):
            run = list(group)
            if is_drawn:
                found.append((tuple(token for _, token, _ in run), sum(logprob for _, _, logprob in run)))
    return found


def _all_tokens(tokens: dict[str, Any]) -> list[int]:
    return [token for segment in tokens["segments"] for token in segment["token_ids"]]
