"""The decoder's cache for replies of different lengths, to which replies join and from which they leave at each step.

All rows share the columns of the cache. A row that joins later begins in a later column, so that the newest token of
every row is in the same column: its row is padded on the left. T5 and its relatives only use the difference of two
positions, so this is exact for them. Rows of other models share a cache only if they joined together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

_FIRST_COLUMNS, _FIRST_ROWS = 32, 8


class _Columns:
    """The columns that are in use: from `low` up to `end`."""

    def __init__(self) -> None:
        self.low = self.end = self.num_rows = 0


class _SelfLayer(CacheLayerMixin):
    """The states of one layer of self-attention, of shape (rows, heads, columns, features)."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self, columns: _Columns) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self._columns = columns
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes the states of one new token of each row into the next column. Returns those of all columns in use."""
        used = self._columns
        rows, columns = slice(0, used.num_rows), slice(used.low, used.end + 1)
        self.keys[rows, :, used.end] = key_states[:, :, 0]
        self.values[rows, :, used.end] = value_states[:, :, 0]
        return self.keys[rows, :, columns], self.values[rows, :, columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns.end - self._columns.low + query_length, 0

    def get_seq_length(self) -> int:
        return self._columns.end - self._columns.low

    def get_max_length(self) -> int:
        return -1


class _CrossLayer(CacheLayerMixin):
    """The states of one layer of cross-attention. `keys` and `values` are views of the rows in use."""

    is_sliding = False
    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.is_initialized = True
        self.all_keys: Any = None
        self.all_values: Any = None

    def show(self, num_rows: int, width: int) -> None:
        self.keys, self.values = self.all_keys[:num_rows, :, :width], self.all_values[:num_rows, :, :width]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError  # a row's states are complete when it joins

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2] if self.keys is not None else 0

    def get_max_length(self) -> int:
        return -1


class Rows:
    """The cache of the replies that are decoded together. The rows are in the order of the caller's replies."""

    def __init__(self) -> None:
        self._columns = _Columns()
        self._self: list[_SelfLayer] = []
        self._cross: list[_CrossLayer] = []
        self._firsts: list[int] = []
        self._widths: list[int] = []

    def __len__(self) -> int:
        return self._columns.num_rows

    @property
    def width(self) -> int:
        """The length of the longest input of the encoder, in tokens."""
        return max(self._widths, default=0)

    def join(self, cache: Any, widths: Sequence[int], chosen: Sequence[int]) -> None:
        """Adds rows of a cache that the model has filled.

        widths: the lengths of the encoder's inputs of the rows of `cache`. chosen: which of its rows join.
        """
        if not chosen:
            return
        if not self._self:
            self._self = [_SelfLayer(self._columns) for _ in cache.self_attention_cache.layers]
            self._cross = [_CrossLayer() for _ in cache.cross_attention_cache.layers]
        used, length = self._columns, cache.get_seq_length()
        if not used.num_rows:
            used.low, used.end = 0, length
        first, num_rows = used.num_rows, used.num_rows + len(chosen)
        self._firsts += [used.end - length] * len(chosen)
        self._widths += [widths[row] for row in chosen]
        index = torch.tensor(chosen, device=cache.self_attention_cache.layers[0].keys.device)
        width = max(widths[row] for row in chosen)
        for layer, filled in zip(self._self, cache.self_attention_cache.layers, strict=True):
            layer.keys = _grown(layer.keys, filled.keys, num_rows, used.end)
            layer.values = _grown(layer.values, filled.values, num_rows, used.end)
            for states, new in ((layer.keys, filled.keys), (layer.values, filled.values)):
                states[first:num_rows] = 0  # NaN of an earlier reply would survive the mask
                states[first:num_rows, :, used.end - length : used.end] = new[index]
        for layer, filled in zip(self._cross, cache.cross_attention_cache.layers, strict=True):
            layer.all_keys = _grown(layer.all_keys, filled.keys, num_rows, width)
            layer.all_values = _grown(layer.all_values, filled.values, num_rows, width)
            for states, new in ((layer.all_keys, filled.keys), (layer.all_values, filled.values)):
                states[first:num_rows] = 0
                states[first:num_rows, :, :width] = new[index, :, :width]
        used.num_rows = num_rows

    def leave(self, row: int) -> None:
        """Removes a row. The last row takes its place."""
        used, last = self._columns, self._columns.num_rows - 1
        self._firsts[row], self._widths[row] = self._firsts[last], self._widths[last]
        del self._firsts[last], self._widths[last]
        if row != last:
            columns = slice(used.low, used.end)
            for layer in self._self:
                layer.keys[row, :, columns] = layer.keys[last, :, columns]
                layer.values[row, :, columns] = layer.values[last, :, columns]
            width = self._widths[row]
            for layer in self._cross:
                layer.all_keys[row, :, :width] = layer.all_keys[last, :, :width]
                layer.all_values[row, :, :width] = layer.all_values[last, :, :width]
        used.num_rows = last
        used.low = min(self._firsts, default=used.low)

    def prepare(self, device: torch.device) -> tuple[EncoderDecoderCache, Tensor, Tensor]:
        """Returns the cache for a step, and which columns and which of the encoder's states each row may attend to:
        masks of shape (rows, 1, 1, columns) and (rows, 1, 1, states)."""
        self._make_room()
        used, width = self._columns, self.width
        for layer in self._cross:
            layer.show(used.num_rows, width)
        columns = torch.arange(used.low, used.end + 1, device=device)
        own = columns >= torch.tensor(self._firsts, device=device)[:, None]
        seen = torch.arange(width, device=device) < torch.tensor(self._widths, device=device)[:, None]
        cache = EncoderDecoderCache(Cache(layers=list(self._self)), Cache(layers=list(self._cross)))
        return cache, own[:, None, None], seen[:, None, None]

    def advance(self) -> None:
        """Notes that a step has filled the next column."""
        self._columns.end += 1

    def _make_room(self) -> None:
        """Makes the next column available: moves the columns in use to the front, or enlarges the cache."""
        used = self._columns
        if used.end < self._self[0].keys.shape[2]:
            return
        shift, rows = used.low, slice(0, used.num_rows)
        for layer in self._self:
            if shift:
                for states in (layer.keys, layer.values):
                    states[rows, :, : used.end - shift] = states[rows, :, shift : used.end].clone()
            else:
                layer.keys = _grown(layer.keys, layer.keys, used.num_rows, used.end + 1)
                layer.values = _grown(layer.values, layer.values, used.num_rows, used.end + 1)
        used.low, used.end = 0, used.end - shift
        self._firsts = [first - shift for first in self._firsts]


def _grown(states: Any, like: Any, num_rows: int, width: int) -> Any:
    """Returns the tensor with at least this number of rows and this width. It doubles, so that it rarely has to."""
    old_rows, old_width = (states.shape[0], states.shape[2]) if states is not None else (0, 0)
    if num_rows <= old_rows and width <= old_width:
        return states
    new_rows = old_rows if num_rows <= old_rows else max(num_rows, 2 * old_rows, _FIRST_ROWS)
    new_width = old_width if width <= old_width else max(width, 2 * old_width, _FIRST_COLUMNS)
    grown = like.new_zeros(new_rows, like.shape[1], new_width, like.shape[3])
    if states is not None:
        grown[:old_rows, :, :old_width] = states
    return grown
