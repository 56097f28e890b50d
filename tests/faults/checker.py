"""Compares what the service stored of an episode with the answers that its caller received. Does no I/O.

Every acknowledged step must be stored exactly once, as it was answered.
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
"""Allowed difference of logprobs: each token's is stored as a 32-bit float, and an answer has their sum."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference between an acknowledged answer and what is stored."""

    kind: Kind
    episode_id: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: episode {self.episode_id}: {self.detail}"


def check(history: History, stored: dict[str, Any], tokens: dict[str, Any]) -> list[Finding]:
    """Returns the differences between `history` and the episode's trajectory in the formats `steps` and `tokens`."""
    found = [*_order(history, stored), *_contents(history, stored), *_rewards(history, stored)]
    if not found:  # the tokens can be assigned to steps only if the steps are correct
        found = list(_tokens(history, tokens))
    return [Finding(kind, history.episode_id, detail) for kind, detail in found]


def check_retry(history: History, taken: Taken, again: Act) -> list[Finding]:
    """Returns the differences between the first answer to a call and the answer to its retry."""
    different = [name for name in ("step", "done", *_SAME) if getattr(again, name) != getattr(taken.answer, name)]
    if not again.replayed:
        different.append("replayed")
    return [
        Finding("retry", history.episode_id, f"step {taken.sent.step}: the retry differs in {', '.join(different)}")
    ] * bool(different)


def remember(history: History, tokens: dict[str, Any]) -> None:
    """Stores the tokens in `history`, so that later checks compare with them. Call it only if `check` found nothing."""
    history.completions = {**completions(history, tokens), **history.completions}
    history.prefix = _all_tokens(tokens)


def _order(history: History, stored: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    indices = [step["step"] for step in stored["steps"]]
    known = range(len(history.steps))
    for index in known:
        if index not in indices:
            yield "loss", f"step {index} was acknowledged but is not stored"
    for index, times in Counter(indices).items():
        if times > 1:
            yield "double", f"step {index} is stored {times} times"
        if index not in known:
            yield "double", f"step {index} is stored, but no answer acknowledged it"
    if sorted(set(indices)) != list(range(len(set(indices)))) or indices != sorted(indices):
        yield "gap", f"the stored steps are not consecutive: {indices}"
    for observation, times in Counter(step["observation"] for step in stored["steps"]).items():
        if times > 1:
            yield "double", f"the observation {observation!r} was sent once, but is stored {times} times"


def _contents(history: History, stored: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    by_index = {step["step"]: step for step in stored["steps"]}
    for index, taken in enumerate(history.steps):
        if taken.answer.step != index:
            yield "double", f"the call for step {index} was answered with step {taken.answer.step}"
        stored_step = by_index.get(index)
        if stored_step is None:
            continue
        if stored_step["observation"] != taken.sent.observation:
            yield "changed", f"step {index}: another observation is stored: {stored_step['observation']!r}"
        for name in _SAME:
            answered = getattr(taken.answer, name)
            if stored_step[name] != answered:
                yield "changed", f"step {index}: {name} was {answered!r} in the answer and is {stored_step[name]!r} now"
    ended = stored["episode"]["status"] == "ended"
    if ended != history.ended:
        yield "changed", f"the episode is stored with ended={ended}, but the answers said {history.ended}"


def _rewards(history: History, stored: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    total, sent = stored["episode"]["episode_return"], sum(history.rewards)
    if total != sent:
        yield "reward", f"the stored return is {total}, but the rewards sent sum to {sent}"
    each = [step["reward"] for step in stored["steps"] if step["reward"] is not None]
    if each != history.rewards:
        yield "reward", f"the stored rewards are {each}, but {history.rewards} were sent"


def _tokens(history: History, tokens: dict[str, Any]) -> Iterator[tuple[Kind, str]]:
    runs = _runs(tokens)
    drawn = [taken for taken in history.steps if taken.sent.recorded is None]
    if len(runs) != len(drawn):
        yield "tokens", f"the token log has {len(runs)} completions, but the policy acted in {len(drawn)} steps"
        return
    for taken, (ids, logprob) in zip(drawn, runs, strict=True):
        step, answer = taken.sent.step, taken.answer
        num_tokens = answer.usage.completion_tokens if answer.usage else 0
        # In a discrete action, tokens that follow from the previous ones are forced and not drawn.
        if len(ids) > num_tokens or (len(ids) < num_tokens and history.space != "discrete"):
            yield "tokens", f"step {step}: {len(ids)} drawn tokens are stored, but the answer reports {num_tokens}"
        if answer.logprob is None or abs(logprob - answer.logprob) > _TOLERANCE:
            yield "tokens", f"step {step}: the stored logprob is {logprob}, but the answer has {answer.logprob}"
        if history.completions.get(step, ids) != ids:
            yield "tokens", f"step {step}: the drawn tokens were {history.completions[step]} and are {ids} now"
    if _all_tokens(tokens)[: len(history.prefix)] != history.prefix:
        yield "tokens", "the tokens that an earlier audit read are not a prefix of the stored tokens"


def completions(history: History, tokens: dict[str, Any]) -> Completions:
    """Returns the tokens that the policy drew, by step.

    There are always other tokens between two completions. So each completion is one run of tokens with loss mask 1.
    """
    drawn = [taken.sent.step for taken in history.steps if taken.sent.recorded is None]
    return {step: ids for step, (ids, _) in zip(drawn, _runs(tokens), strict=True)}


def _runs(tokens: dict[str, Any]) -> list[tuple[tuple[int, ...], float]]:
    """Returns the drawn tokens and their summed logprob for each completion."""
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
