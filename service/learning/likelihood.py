"""The log-probability of tokens under the policy, defined as the service stores it.

A token was drawn from the softmax of logits / temperature over its support. The support of a discrete action's token is
the tokens that lead to legal actions, so a log-probability over the whole vocabulary would differ by the mass of the
other tokens. Log-softmax is computed in float32.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.learning.segments import Integers, Kind, Row

_NONE = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as tensors. N is the number of trained tokens of all rows.

    input_ids: (rows, length), padded at the end with zeros. No trained token sees the padding, because the model
    is causal, or its decoder.
    attention_mask: (rows, length), 1 for tokens and 0 for padding.
    encoder_ids, encoder_mask: the same for what the encoder receives; without columns for a decoder-only model.
    rows, columns: (N,) the place of the logits of each trained token: one before the token.
    targets: (N,) the tokens.
    temperatures: (N,)
    bound, free: which of the N have a support of ids, and which have the whole vocabulary.
    support: (bound, K) ids; `absent` is true where a support has fewer than K.
    """

    input_ids: Tensor
    attention_mask: Tensor
    encoder_ids: Tensor
    encoder_mask: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    temperatures: Tensor
    bound: Tensor
    free: Tensor
    support: Tensor
    absent: Tensor


def collate(rows: Sequence[Row], device: torch.device | str = "cpu") -> Batch:
    """Makes a batch of rows, which have at least one trained token."""
    input_ids, attention_mask = _stacked([row.token_ids for row in rows])
    encoder_ids, encoder_mask = _stacked([_NONE if row.encoder_ids is None else row.encoder_ids for row in rows])
    columns = np.concatenate([row.positions for row in rows]).astype(np.int64) - 1
    places = np.repeat(np.arange(len(rows)), [len(row.positions) for row in rows])
    kinds = np.concatenate([row.kinds for row in rows])
    sizes = np.concatenate([row.support_sizes for row in rows])[kinds == Kind.IDS]
    support, absent = _padded(np.concatenate([row.support_ids for row in rows]), sizes)
    temperatures = np.concatenate([np.where(row.kinds == Kind.RECORDED, 1.0, row.temperature) for row in rows])
    arrays = (
        input_ids,
        attention_mask,
        encoder_ids,
        encoder_mask,
        places,
        columns,
        input_ids[places, columns + 1],
        temperatures.astype(np.float32),
        np.flatnonzero(kinds == Kind.IDS),
        np.flatnonzero(kinds != Kind.IDS),
        support,
        absent,
    )
    return Batch(*(torch.as_tensor(array, device=device) for array in arrays))


def _stacked(rows: Sequence[Integers]) -> tuple[Any, Any]:
    """Returns the rows as a matrix, padded at the end with zeros, and a mask with 1 for ids and 0 for padding."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask


def _padded(ids: Any, sizes: Any) -> tuple[Any, Any]:
    """Returns supports, which follow each other in `ids`, as a matrix, and where it is padding."""
    width = int(sizes.max()) if sizes.size else 0
    absent = np.arange(width) >= sizes[:, None]
    support = np.zeros((len(sizes), width), np.int64)
    support[~absent] = ids
    return support, absent


def token_logprobs(model: Any, batch: Batch) -> Tensor:
    """Returns the log-probability of each trained token, (N,) in float32.

    model: a causal or encoder-decoder model of the transformers library. It is asked for logits only at trained
    positions.
    """
    logits = _logits(model, batch)
    scaled = logits.gather(1, batch.targets[:, None])[:, 0].float() / batch.temperatures
    normalisers = torch.empty_like(scaled)
    if len(batch.free):
        over_all = logits[batch.free] if len(batch.bound) else logits
        values = over_all.float() / batch.temperatures[batch.free, None]
        normalisers = normalisers.index_copy(0, batch.free, values.logsumexp(dim=-1))
    if len(batch.bound):
        values = logits[batch.bound[:, None], batch.support].float() / batch.temperatures[batch.bound, None]
        values = values.masked_fill(batch.absent, -torch.inf)
        normalisers = normalisers.index_copy(0, batch.bound, values.logsumexp(dim=-1))
    return scaled - normalisers


def _logits(model: Any, batch: Batch) -> Tensor:
    """Returns the logits at the trained positions, (N, vocabulary).

    The output layer receives only these hidden states. Whatever a model does to its logits afterwards still happens.
    """
    inputs: dict[str, Tensor | None] = {"input_ids": batch.input_ids, "attention_mask": _mask(model, batch)}
    if batch.encoder_ids.shape[1]:
        inputs = {
            "input_ids": batch.encoder_ids,
            "attention_mask": batch.encoder_mask,
            "decoder_input_ids": batch.input_ids,
        }
    with _only_at(model.get_output_embeddings(), batch):
        return model(**inputs, use_cache=False).logits


def _mask(model: Any, batch: Batch) -> Tensor | None:
    """The attention mask where it makes attention cheaper. It does not change the result.

    Without a mask, attention is causal. PyTorch has fast kernels for this, but not in float32 on a GPU if several query
    heads share a key: transformers then takes the slowest one, which keeps the matrix of all pairs of tokens.
    """
    return batch.attention_mask if batch.input_ids.is_cuda and model.dtype == torch.float32 else None


@contextmanager
def _only_at(head: Any, batch: Batch) -> Generator[None]:
    def pick(_: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (arguments[0][batch.rows, batch.columns],)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
