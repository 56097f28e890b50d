"""The forward passes of an encoder-decoder model of the transformers library."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as transformers_log

from service.engine.base import EngineRefused
from service.engine.seq2seq.messages import ModelOptions
from service.engine.seq2seq.rows import Rows

_MAX_LOGITS = 1 << 26
"""Maximum number of logits of one pass over paths: 256 MB."""


class Seq2SeqModel:
    """A model, its adapters, and the passes that the worker needs.

    is_ragged: whether replies of different lengths can share a pass of the decoder; see `rows`.
    """

    def __init__(self, options: ModelOptions) -> None:
        """Loads the weights. Raises EngineRefused."""
        self._options = options
        self._model = _load(options)
        config: Any = self._model.config
        self.is_ragged = hasattr(config, "relative_attention_num_buckets")
        self.vocab_size: int = self._model.get_output_embeddings().weight.shape[0]
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self._device: torch.device = self._model.device
        self._states = torch.zeros(1, 1, 1, dtype=self._model.dtype, device=self._device)
        self._prefix = torch.tensor([options.prefix], device=self._device)
        self._adapters: dict[str, str] = {}
        self._active: str | None = None
        self._num_loaded = 0

    def begin(self, inputs: Sequence[Sequence[int]]) -> tuple[EncoderDecoderCache, Tensor]:
        """Encodes inputs, and runs the decoder over the prefix of a reply.

        Returns the cache, and the logits of the first token of each reply: float32, of shape (inputs, vocabulary).
        """
        longest = max(map(len, inputs))
        ids = torch.tensor([[*one, *([0] * (longest - len(one)))] for one in inputs], device=self._device)
        lengths = torch.tensor([len(one) for one in inputs], device=self._device)
        mask = (torch.arange(longest, device=self._device) < lengths[:, None]).long()
        encoded = self._model.get_encoder()(input_ids=ids, attention_mask=mask)
        out = self._model(
            encoder_outputs=_encoded(encoded.last_hidden_state),
            attention_mask=mask,
            decoder_input_ids=self._prefix.expand(len(inputs), -1),
            use_cache=True,
        )
        return out.past_key_values, out.logits[:, -1].float()

    def step(self, rows: Rows, token_ids: Sequence[int]) -> Tensor:
        """Runs the decoder over one more token of each row. Returns the logits of the next one, as `begin` does."""
        cache, own, seen = rows.prepare(self._device)
        out = self._model(
            encoder_outputs=_encoded(self._states.expand(len(rows), seen.shape[-1], -1)),
            attention_mask=seen,
            decoder_input_ids=torch.tensor(token_ids, device=self._device)[:, None],
            decoder_attention_mask=own,
            past_key_values=cache,
            use_cache=True,
        )
        rows.advance()
        return out.logits[:, -1].float()

    def follow(
        self, cache: EncoderDecoderCache, widths: Sequence[int], paths: Sequence[tuple[int, Sequence[int]]]
    ) -> "list[Tensor]":
        """Runs the decoder over paths of tokens behind the prefix, which the cache of `begin` holds.

        paths: for each path, the row of the cache, and its token ids.
        widths: the lengths of the encoder's inputs of the cache's rows.

        Returns the logits behind each token of each path: float32, of shape (tokens, vocabulary).
        """
        found: list[Tensor] = []
        longest, width = max(len(ids) for _, ids in paths), max(widths[row] for row, _ in paths)
        room = min(self._options.max_encoder_tokens // width, _MAX_LOGITS // (longest * self.vocab_size))
        size = max(1, min(self._options.max_rows, room))
        for start in range(0, len(paths), size):
            part = paths[start : start + size]
            found += self._follow(cache, widths, part)
        return found

    def _follow(
        self, cache: EncoderDecoderCache, widths: Sequence[int], paths: Sequence[tuple[int, Sequence[int]]]
    ) -> "list[Tensor]":
        rows = torch.tensor([row for row, _ in paths], device=self._device)
        longest, width = max(len(ids) for _, ids in paths), max(widths[row] for row, _ in paths)
        ids = torch.tensor([[*ids, *([0] * (longest - len(ids)))] for _, ids in paths], device=self._device)
        lengths = torch.tensor([widths[row] for row, _ in paths], device=self._device)
        own, cross = _copied(cache.self_attention_cache, rows), _copied(cache.cross_attention_cache, rows, width)
        out = self._model(
            encoder_outputs=_encoded(self._states.expand(len(paths), width, -1)),
            attention_mask=(torch.arange(width, device=self._device) < lengths[:, None]).long(),
            decoder_input_ids=ids,  # padded on the right, where no token of the path attends to
            past_key_values=EncoderDecoderCache(own, cross),
            use_cache=True,
        )
        return [out.logits[place, : len(ids)].float() for place, (_, ids) in enumerate(paths)]

    def load_adapter(self, name: str, path: str) -> None:
        """Loads a LoRA adapter, unless it is loaded. Raises whatever PEFT raises. The base model is active then."""
        if name in self._adapters:
            return
        own = f"adapter{self._num_loaded}"  # names must not contain dots
        self._num_loaded += 1
        try:
            self._model.load_adapter(path, adapter_name=own)
            self._adapters[name] = own
        finally:
            self._active = None
            with contextlib.suppress(ValueError):  # no adapter was ever loaded
                self._model.disable_adapters()
            self._model.eval()

    def unload_adapter(self, name: str) -> None:
        """Unloads an adapter, if it is loaded."""
        if name in self._adapters:
            self.use(None)
            self._model.delete_adapter(self._adapters.pop(name))

    def use(self, name: str | None) -> None:
        """Chooses the adapter of the next passes; None for the base model. Raises KeyError if it is not loaded."""
        own = None if name is None else self._adapters[name]
        if own == self._active:
            return
        if own is None:
            self._model.disable_adapters()
        else:
            self._model.enable_adapters()
            self._model.set_adapter(own)
        self._active = own


def _encoded(states: Any) -> BaseModelOutput:
    return BaseModelOutput(last_hidden_state=states)


def _copied(cache: Any, rows: Tensor, width: int | None = None) -> DynamicCache:
    copied: Any = DynamicCache()
    for place, layer in enumerate(cache.layers):
        copied.update(layer.keys[rows][:, :, :width], layer.values[rows][:, :, :width], place)
    return copied


def _load(options: ModelOptions) -> Any:
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    auto: Any = AutoModelForSeq2SeqLM
    try:
        model, report = auto.from_pretrained(
            options.model,
            dtype=_dtype(options),
            trust_remote_code=options.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise EngineRefused(f"{options.model}: {str(error)[:500]}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise EngineRefused(f"{options.model}: the weights cannot be read: {str(error)[:300]}") from error
    missing: list[str] = sorted(report["missing_keys"])
    if missing:
        names = ", ".join(missing[:5])
        raise EngineRefused(f"{options.model}: {len(missing)} weights are missing from its files, such as {names}")
    if model.dtype == torch.float16:  # T5 overflows in float16
        model = model.float()
    model.eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def _dtype(options: ModelOptions) -> Any:
    return "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
