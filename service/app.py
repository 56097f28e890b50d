"""Creates the app: connects the store, engine, sessions and HTTP API, and manages their lifespan."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache, partial

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from service.access.admission import Admission
from service.access.keys import Keyring
from service.agent.policies import Policies
from service.api.http import cors, openapi, problems
from service.api.http.middleware import Failures, RequestContext
from service.api.http.routing import Shortcut
from service.api.http.schemas import EpisodeFields
from service.api.http.security import Security, is_loopback
from service.api.http.services import Services
from service.api.routes import (
    acts,
    documentation,
    episodes,
    evaluation,
    export,
    openai,
    operations,
    policies,
    profiles,
)
from service.engine.base import Engine, EngineInfo, EngineRefused, TemplateReport
from service.engine.load import load_engine
from service.engine.supervisor import Callback, Load, Supervisor, stop
from service.lifecycle import Lifecycle
from service.observability import logs, metrics
from service.sessions.profiles import Profiles
from service.sessions.retention import Retention
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
    on_ready: Callback = lambda: None,
    on_fatal: Callback = lambda: None,
) -> FastAPI:
    """Creates the app.

    engine: replaces the engine of the settings. It is an engine, or a function that loads one at each (re)start.
    store: replaces the store of the settings.
    on_ready: called each time an engine is ready.
    on_fatal: called when the supervisor gives up or fails, so that the process can exit with an error.
    """
    used_store = store or SQLStore(settings.store_url, metrics.count_commit)
    services = _services(settings, used_store)
    serving = partial(_serving, services, on_ready)
    supervisor = Supervisor(_loader(settings, engine), serving, services.lifecycle, settings, on_fatal)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            await used_store.open()
            stack.push_async_callback(used_store.close)
            expiring = asyncio.create_task(services.sessions.expiry.run(), name="expiry")
            stack.push_async_callback(stop, expiring)
            if settings.retention_s is not None:
                lifetimes = settings.retention_s, settings.tombstone_retention_s
                retention = Retention(used_store, *lifetimes, services.sessions.forget)
                stack.push_async_callback(stop, asyncio.create_task(retention.run(), name="retention"))
            running = asyncio.create_task(supervisor.run(), name="supervisor")
            running.add_done_callback(partial(_end_if_failed, on_fatal))
            stack.push_async_callback(stop, running)
            yield

    app = FastAPI(
        title="Episodic",
        summary="A stateful agent service.",
        lifespan=lifespan,
        version=openapi.VERSION,
        openapi_url=None,  # `documentation` serves it
    )
    app.state.services = services
    app.router.routes.extend(_routes(settings.docs))
    problems.install(app)
    openapi.install(app)
    app.add_middleware(Shortcut, handlers={"/act": acts.act, "/act/batch": acts.batch})
    app.add_middleware(Security, keyring=Keyring(used_store), loopback=is_loopback(settings.host))
    app.add_middleware(Failures)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **cors.OPTIONS)
    app.add_middleware(RequestContext, services=services)
    return app


def _services(settings: Settings, store: Store) -> Services:
    lifecycle = Lifecycle()
    admission = Admission(settings.quota_of, max_running=settings.max_running_acts, max_queued=settings.max_queued_acts)
    sessions = Sessions(
        store,
        max_cached_episodes=settings.max_live_episodes,
        defaults=settings.episode_defaults,
        admission=admission,
        lifecycle=lifecycle,
        model_names=(settings.served_name, *settings.model_aliases),
    )
    presets = Profiles(EpisodeFields, settings.profiles)
    for preset in presets:
        metrics.expect_profile(preset.name)
    return Services(settings, lifecycle, admission, sessions, presets)


@asynccontextmanager
async def _serving(services: Services, on_ready: Callback, engine: Engine) -> AsyncGenerator[None]:
    """Serves acts with this engine until the context exits."""
    settings, sessions = services.settings, services.sessions
    kept, aliases = settings.data / "adapters", settings.model_aliases
    adapters = Policies(
        engine,
        sessions.store,
        source=settings.adapters,
        kept=kept,
        aliases=aliases,
        default=settings.default_policy,
    )
    await adapters.restore()
    sessions.serve(engine, adapters)
    following = asyncio.create_task(adapters.follow(), name="policies")
    on_ready()
    _log_ready(settings.url, engine.info, engine.template)
    try:
        yield
    finally:
        await stop(following)


def _end_if_failed(on_fatal: Callback, task: "asyncio.Task[None]") -> None:
    """Ends the process if a task that the service cannot do without has ended by an exception."""
    if task.cancelling():  # by the shutdown
        return
    if task.cancelled() or task.exception():
        failure = None if task.cancelled() else task.exception()
        _log.critical("background_task_failed", task=task.get_name(), exc_info=failure)
        metrics.UNEXPECTED_FAILURES.inc()
        on_fatal()


def _log_ready(url: str, info: EngineInfo, template: TemplateReport | None) -> None:
    report = dataclasses.asdict(template) if template else {}
    _log.info("ready", url=url, policy=info.model, policy_version=info.version, **report)
    if info.no_episodes:
        _log.warning("episodes_not_served", reason=info.no_episodes)
    if template is None:
        return
    if not template.append_only:
        _log.warning("chat_template_rewrites_turns")
    if not template.canonical:
        _log.warning("chat_template_tokenization_differs")


@cache
def _routes(has_docs: bool) -> Sequence[BaseRoute]:
    """Returns the routes of the API. All apps of a process share them: FastAPI takes long to analyse handlers."""
    modules = (acts, episodes, profiles, policies, export, evaluation, openai, operations)
    api = APIRouter(generate_unique_id_function=_operation_id)
    for router in (*(module.router for module in modules), documentation.index):
        api.include_router(router)
    if has_docs:
        api.include_router(documentation.router)
    return api.routes


def _operation_id(route: APIRoute) -> str:
    return f"{route.tags[0]}_{route.name}" if route.tags else route.name


def _loader(settings: Settings, engine: Engine | Load | None) -> Load:
    if engine is None:
        return partial(load_engine, settings)
    if callable(engine):
        return engine

    async def given() -> Engine:
        if not engine.healthy:
            raise EngineRefused("the engine that was passed to create_app has died, and it cannot be loaded again")
        return engine

    return given
