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
    lora = {"enable_lora": True, "max_loras": 4} if settings.adapters else {}
    engine = await VLLMEngine.load(
        settings.model_path,
        {**lora, **settings.engine},
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
