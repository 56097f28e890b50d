"""Draws the next tokens of a batch of replies. The parameters have the same meaning as in vLLM.

The temperature comes first, then min_p, top_k and top_p. The log-probability of a token is that under the distribution
from which it was drawn; at temperature 0 it is that of temperature 1, and filters change nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from service.engine.seq2seq.messages import Generate
from service.trajectory import Sampling


@dataclass(slots=True)
class Reply:
    """A reply that is being generated.

    number: that of its request.
    matcher: llguidance's matcher, if the reply must satisfy a grammar.
    """

    number: int
    request: Generate
    generator: random.Random
    matcher: Any = None
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling


def draw(logits: Tensor, replies: Sequence[Reply]) -> None:
    """Draws a token for each reply, and adds it. `logits`: float32, of shape (replies, vocabulary); it is changed."""
    for row, reply in enumerate(replies):
        if reply.matcher is not None:
            logits[row].masked_fill_(~_allowed(reply.matcher, logits.shape[1]).to(logits.device), -torch.inf)
    temperatures = [reply.sampling.temperature for reply in replies]
    if any(temperature not in (0.0, 1.0) for temperature in temperatures):
        logits /= torch.tensor([temperature or 1.0 for temperature in temperatures], device=logits.device)[:, None]
    for row, reply in enumerate(replies):
        if reply.sampling.temperature and reply.sampling.has_filters:
            _filter(logits[row], reply.sampling)
    logprobs = logits.log_softmax(-1)
    token_ids = logprobs.argmax(-1)
    if sampled := [row for row, temperature in enumerate(temperatures) if temperature]:
        token_ids[sampled] = _sample(logprobs[sampled], [replies[row].generator.random() for row in sampled])
    drawn: Any = logprobs.gather(1, token_ids[:, None])[:, 0]
    ids: Any = token_ids
    for reply, token_id, logprob in zip(replies, ids.tolist(), drawn.tolist(), strict=True):
        reply.token_ids.append(token_id)
        reply.logprobs.append(logprob)
        if reply.matcher is not None:
            reply.matcher.consume_token(token_id)


def _allowed(matcher: Any, size: int) -> Tensor:
    """Returns a mask of the tokens that the grammar allows next."""
    bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
    mask = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
    allowed = torch.zeros(size, dtype=torch.bool)
    num_known = min(size, len(mask))
    allowed[:num_known] = mask[:num_known]
    return allowed


def _filter(logits: Tensor, sampling: Sampling) -> None:
    """Sets the logits of all tokens that the filters rule out to -inf. The likeliest token always stays."""
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        logits[probs < sampling.min_p * probs.max()] = -torch.inf
    if 0 < sampling.top_k < len(logits):
        logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        is_out = ordered.cumsum(-1) - ordered >= sampling.top_p
        is_out[0] = False
        logits[order[is_out]] = -torch.inf


def _sample(logprobs: Tensor, points: Sequence[float]) -> Tensor:
    """Draws by the inverse of the distribution function, with a point of [0, 1) for each row. In float64, because the
    sum of a large vocabulary's probabilities is inexact in float32."""
    ends = logprobs.double().exp().cumsum(-1)
    places = ends[:, -1:] * torch.tensor(points, dtype=torch.float64, device=ends.device)[:, None]
    return torch.searchsorted(ends, places, right=True)[:, 0].clamp_(max=ends.shape[1] - 1)
