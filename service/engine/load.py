"""Chooses the engine for a model and loads it. To add a kind of engine, extend `load_engine`."""

import dataclasses

from service.engine.base import Engine
from service.observability import logs
from service.settings import Settings

_log = logs.get(__name__)


async def load_engine(settings: Settings) -> Engine:
    """Loads the engine that serves `settings.model`, which takes seconds to minutes. Raises EngineRefused."""
    from service.engine.vllm.engine import VLLMEngine  # imported here because it takes seconds

    _log.info("engine_loading", model=settings.model)
    engine = await VLLMEngine.load(
        settings.model_path,
        {**_adapter_options(settings), **settings.engine},
        name=settings.served_name,
        aliases=settings.model_aliases,
        grammar_limit_s=settings.constraint_limit_s,
        openai_options=settings.openai,
        media_hosts=settings.media_hosts,
        cache=settings.data / "weights.json",
    )
    if settings.max_tokens:
        sampling = dataclasses.replace(engine.info.default_sampling, max_tokens=settings.max_tokens)
        engine.info = dataclasses.replace(engine.info, default_sampling=sampling)
    return engine


def _adapter_options(settings: Settings) -> dict[str, int | bool]:
    """Returns vLLM's options for adapters: at most `max_loras` share a batch, and `max_cpu_loras` are in memory."""
    if not settings.adapters and not settings.engine.get("enable_lora"):
        return {}
    limits = {} if "max_loras" in settings.engine else {"max_loras": 4, "max_cpu_loras": 16}
    return {"enable_lora": True, **limits}
