"""The composition root: puts store, engine and sessions together under one lifespan, and the HTTP face before them."""

import asyncio
import dataclasses
import gc
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from service import logs, metrics
from service.admission import Admission
from service.api import acts, episodes, export, inference, openapi, operations, policies, problems, profiles
from service.api.middleware import RequestContext
from service.api.security import Security, is_loopback
from service.engine.base import Engine
from service.keys import Keyring
from service.policies import Policies
from service.sessions import Sessions
from service.settings import Settings
from service.store.base import Store
from service.store.sql import SQLStore

_log = logs.get(__name__)

OnFatal = Callable[[], None]


def create_app(
    settings: Settings, *, engine: Engine | None = None, store: Store | None = None, on_fatal: OnFatal = lambda: None
) -> FastAPI:
    """The application. `engine` and `store` take the place of those that the settings name; `on_fatal` is called when
    the engine cannot be loaded or has died, for the process to end loudly."""
    kept = store or SQLStore(settings.store_url, metrics.record_commit)
    sessions = Sessions(
        kept,
        max_live_episodes=settings.max_live_episodes,
        defaults=settings.episode_defaults,
        admission=Admission(
            settings.quota_of, max_running=settings.max_running_acts, max_queued=settings.max_queued_acts
        ),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            await kept.open()
            stack.push_async_callback(kept.close)
            supervisor = asyncio.create_task(_run_engine(settings, engine, sessions, on_fatal), name="engine")
            stack.push_async_callback(_stop, supervisor)
            yield

    app = FastAPI(
        title="Episodic",
        summary="A stateful agent service.",
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        **({} if settings.docs else {"openapi_url": None, "docs_url": None, "redoc_url": None}),
    )
    app.state.settings = settings
    app.state.sessions = sessions
    app.state.profiles = profiles.Profiles(settings.profiles)
    for module in (acts, episodes, profiles, policies, export, inference, operations):
        app.include_router(module.router)
    problems.install(app)
    openapi.install(app)
    app.add_middleware(Security, keyring=Keyring(kept), loopback=is_loopback(settings.host))
    app.add_middleware(RequestContext)
    return app


def _operation_id(route: APIRoute) -> str:
    return f"{route.tags[0]}_{route.name}" if route.tags else route.name


async def _run_engine(settings: Settings, engine: Engine | None, sessions: Sessions, on_fatal: OnFatal) -> None:
    """Loads the engine while /healthz answers already, then watches it. Its failure is the process's."""
    try:
        loaded = engine or await _load(settings)
    except Exception:  # noqa: BLE001 - whatever it is, the process must not live on without a policy
        _log.exception("the engine cannot be loaded", model=settings.model)
        on_fatal()
        return
    try:
        served = Policies(loaded, sessions.store, source=settings.adapters, kept=settings.data / "adapters")
        await served.restore()
        report = sessions.serve(loaded, served)
        gc.collect()
        gc.freeze()  # what is loaded stays: the collector need not walk it again
        _log.info("ready", policy=loaded.info.model, policy_version=loaded.info.version, **dataclasses.asdict(report))
        if not report.append_only:
            _log.warning("the chat template rewrites earlier turns; episodes keep them as the policy saw them")
        if not report.canonical:
            _log.warning("the chat template's own tokenization differs from the episode's")
        sweeper = asyncio.create_task(sessions.sweeper.run(), name="sweeper")
        try:
            await loaded.watch()
        finally:
            await _stop(sweeper)
        _log.critical("the engine died")
        on_fatal()
    except Exception:  # noqa: BLE001 - as above
        _log.exception("the engine cannot be served", model=settings.model)
        on_fatal()
    finally:
        await loaded.close()


async def _load(settings: Settings) -> Engine:
    from service.engine.async_llm import FrontEnd, VLLMEngine  # seconds of import, only where vLLM is served

    _log.info("loading", model=settings.model)
    engine = await VLLMEngine.load(
        settings.model_path,
        settings.engine_options,
        name=settings.model,
        grammar_limit_s=settings.constraint_limit_s,
        front_end=FrontEnd(settings.openai, tuple(settings.media_hosts)),
    )
    if settings.max_tokens:
        sampling = dataclasses.replace(engine.info.default_sampling, max_tokens=settings.max_tokens)
        engine.info = dataclasses.replace(engine.info, default_sampling=sampling)
    return engine


async def _stop(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
