"""The composition root: puts store, engine and sessions together under one lifespan, and the HTTP face before them."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.routing import APIRoute

from service.access.admission import Admission
from service.access.keys import Keyring
from service.api.http import openapi, problems
from service.api.http.middleware import RequestContext
from service.api.http.security import Security, is_loopback
from service.api.profiles import Profiles
from service.api.routes import acts, episodes, export, openai, operations, policies, profiles
from service.engine.base import Engine, EngineRefused
from service.engine.supervisor import Heard, Load, Supervisor, stop
from service.observability import logs, metrics
from service.sessions.sessions import Sessions
from service.settings import Settings
from service.store.base import Store
from service.store.sql import SQLStore

_log = logs.get(__name__)


def create_app(
    settings: Settings,
    *,
    engine: Engine | Load | None = None,
    store: Store | None = None,
    on_ready: Heard = lambda: None,
    on_fatal: Heard = lambda: None,
) -> FastAPI:
    """The application. `engine`, or what loads one each time, and `store` take the place of those that the settings
    name; `on_ready` is called each time that an engine begins to serve, `on_fatal` when there is none any more and will
    be none, for the process to end loudly."""
    kept = store or SQLStore(settings.store_url, metrics.record_commit)
    sessions = Sessions(
        kept,
        max_live_episodes=settings.max_live_episodes,
        defaults=settings.episode_defaults,
        admission=Admission(
            settings.quota_of, max_running=settings.max_running_acts, max_queued=settings.max_queued_acts
        ),
    )

    supervisor = Supervisor(_loader(settings, engine), sessions, settings, on_ready, on_fatal)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            await kept.open()
            stack.push_async_callback(kept.close)
            running = asyncio.create_task(supervisor.run(), name="engine")
            stack.push_async_callback(stop, running)
            yield

    app = FastAPI(
        title="Episodic",
        summary="A stateful agent service.",
        lifespan=lifespan,
        generate_unique_id_function=_operation_id,
        openapi_url="/openapi.json" if settings.docs else None,  # /docs and /redoc go with it
    )
    app.state.settings = settings
    app.state.sessions = sessions
    app.state.supervisor = supervisor
    app.state.profiles = Profiles(settings.profiles)
    for profile in app.state.profiles:
        metrics.expect_profile(profile.name)
    for module in (acts, episodes, profiles, policies, export, openai, operations):
        app.include_router(module.router)
    problems.install(app)
    openapi.install(app)
    app.add_middleware(Security, keyring=Keyring(kept), loopback=is_loopback(settings.host))
    app.add_middleware(RequestContext)
    return app


def _operation_id(route: APIRoute) -> str:
    return f"{route.tags[0]}_{route.name}" if route.tags else route.name


def _loader(settings: Settings, engine: Engine | Load | None) -> Load:
    if engine is None:
        return partial(_load, settings)
    if callable(engine):
        return engine

    async def given() -> Engine:
        if not engine.healthy:
            raise EngineRefused("the engine that was handed in is dead, and there is no other")
        return engine

    return given


async def _load(settings: Settings) -> Engine:
    from service.engine.vllm.engine import FrontEnd, VLLMEngine  # seconds of import, only where vLLM is served

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
