"""Chooses the engine for a model and loads it. To add a kind of engine, extend `load_engine`."""

import asyncio
import dataclasses
from typing import TYPE_CHECKING

from service.engine.base import Engine, EngineRefused
from service.observability import logs
from service.settings import Settings

if TYPE_CHECKING:
    from service.engine.seq2seq.engine import Seq2SeqEngine
    from service.engine.vllm.engine import VLLMEngine

_log = logs.get(__name__)


async def load_engine(settings: Settings) -> Engine:
    """Loads the engine that serves `settings.model`, which takes seconds to minutes. Raises EngineRefused.

    An encoder-decoder model for text is run by transformers, every other model by vLLM.
    """
    from service.engine.seq2seq.loading import is_encoder_decoder  # imported here because the libraries take seconds

    _log.info("engine_loading", model=settings.model)
    is_seq2seq = await asyncio.to_thread(is_encoder_decoder, settings.model_path, settings.engine)
    engine = await (_seq2seq(settings) if is_seq2seq else _vllm(settings))
    if settings.max_tokens:
        sampling = dataclasses.replace(engine.info.default_sampling, max_tokens=settings.max_tokens)
        engine.info = dataclasses.replace(engine.info, default_sampling=sampling)
    return engine


async def _vllm(settings: Settings) -> "VLLMEngine":
    from service.engine.vllm.engine import VLLMEngine

    return await VLLMEngine.load(
        settings.model_path,
        {**_adapter_options(settings), **settings.engine},
        name=settings.served_name,
        aliases=settings.model_aliases,
        grammar_limit_s=settings.constraint_limit_s,
        openai_options=settings.openai,
        media_hosts=settings.media_hosts,
        cache=settings.data / "weights.json",
    )


async def _seq2seq(settings: Settings) -> "Seq2SeqEngine":
    from service.engine.seq2seq.engine import Seq2SeqEngine

    if settings.openai:
        raise EngineRefused("EPISODIC_OPENAI__*: an encoder-decoder model does not serve /v1")
    return await Seq2SeqEngine.load(
        settings.model_path,
        {"enable_lora": settings.adapters is not None, **settings.engine},
        name=settings.served_name,
        grammar_limit_s=settings.constraint_limit_s,
        cache=settings.data / "weights.json",
    )


def _adapter_options(settings: Settings) -> dict[str, int | bool]:
    """Returns vLLM's options for adapters: at most `max_loras` share a batch, and `max_cpu_loras` are in memory."""
    if not settings.adapters and not settings.engine.get("enable_lora"):
        return {}
    limits = {} if "max_loras" in settings.engine else {"max_loras": 4, "max_cpu_loras": 16}
    return {"enable_lora": True, **limits}
