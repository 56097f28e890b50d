"""Engines that die, hang or cannot be loaded: what callers receive, and how the service recovers."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.agent import policies
from service.app import create_app
from service.engine import supervisor
from service.engine.base import EngineRefused
from service.engine.tokenizer import Tokenizer
from service.lifecycle import Phase
from service.settings import Settings
from service.store.base import StoreUnavailable
from service.testing.memory_store import MemoryStore
from service.testing.scripted_engine import ScriptedEngine
from tests.support.serving import DISCRETE, HeldEngine, Served, serve, until

SOON: dict[str, Any] = {"engine_backoff_s": 0.0, "engine_max_failures": 9}


class Loader:
    """Creates a scripted engine at each load. `engine` is the last one. The next `failing` loads fail."""

    def __init__(self, tokenizer: Tokenizer, kind: Callable[[Tokenizer], ScriptedEngine] = ScriptedEngine) -> None:
        self.tokenizer, self.kind = tokenizer, kind
        self.num_loads = 0
        self.failing = 0
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.engine: Any = None

    async def __call__(self) -> ScriptedEngine:
        self.num_loads += 1
        await self.may_load.wait()
        if self.failing:
            self.failing -= 1
            raise EngineRefused("no such weights")
        self.engine = self.kind(self.tokenizer)
        return self.engine


@pytest.fixture
def loader(tokenizer: Tokenizer) -> Loader:
    return Loader(tokenizer)


@asynccontextmanager
async def served(folder: Path, loader: Loader, **settings: Any) -> AsyncIterator[tuple[Served, asyncio.Event]]:
    """Runs the service. The event is set when the supervisor gives up."""
    gave_up = asyncio.Event()
    async with serve(folder, loader, on_fatal=gave_up.set, **{**SOON, **settings}) as api:
        yield api, gave_up


async def ready(api: Served) -> str:
    """Returns why the service is not ready, or "ready"."""
    answer = (await api.client.get("/readyz")).json()
    return answer.get("reason") or answer["status"]


async def reloaded(api: Served, loader: Loader, num_loads: int) -> None:
    await until(lambda: loader.num_loads == num_loads and api.app.state.services.lifecycle.unready_reason is None)


async def test_an_episode_goes_on_from_its_log_after_the_engine_died(tmp_path: Path, loader: Loader):
    async with served(tmp_path, loader) as (api, _):
        await api.open(action_space=DISCRETE)
        await api.act(step=0)
        first, before = loader.engine, await api.trajectory(format="tokens")
        loader.may_load.clear()
        first.die()
        await until(lambda: loader.num_loads == 2)
        assert await ready(api) == "engine_unavailable"
        refused = await api.post_act(step=1)
        assert (refused.status_code, refused.json()["code"]) == (503, "engine_unavailable")
        assert int(refused.headers["Retry-After"]) > 1
        loader.may_load.set()
        await reloaded(api, loader, 2)
        assert await ready(api) == "ready"
        assert (await api.act(step=0))["replayed"]
        assert (await api.act(step=1))["step"] == 1
        assert loader.engine is not first
        seen = before["segments"][0]["token_ids"]
        assert loader.engine.prompts[0][: len(seen)] == seen
        assert (await api.trajectory(format="tokens"))["segments"][0]["token_ids"][: len(seen)] == seen


async def test_an_act_in_flight_is_refused_and_its_retry_is_served(tmp_path: Path, tokenizer: Tokenizer):
    class Slow(ScriptedEngine):
        def __init__(self, tokenizer: Tokenizer) -> None:
            super().__init__(tokenizer, latency_s=30.0 if loader.num_loads == 1 else 0.0)

    loader = Loader(tokenizer, Slow)
    async with served(tmp_path, loader) as (api, _):
        await api.open()
        calls = [asyncio.create_task(api.post_act(step=0)) for _ in range(2)]
        await until(lambda: loader.engine.num_calls)
        loader.engine.die()
        assert {(await call).json()["code"] for call in calls} == {"engine_unavailable"}
        assert (await api.get())["step"] == 0
        await reloaded(api, loader, 2)
        assert not (await api.act(step=0))["replayed"]


async def test_a_stream_ends_with_the_error(tmp_path: Path, tokenizer: Tokenizer):
    loader = Loader(tokenizer, Talking)
    async with served(tmp_path, loader) as (api, _):
        await api.open()
        body = {"episode_id": "e", "observation": "x", "step": 0}
        async with api.client.stream("POST", "/act", json=body, headers={"Accept": "text/event-stream"}) as answer:
            lines = answer.aiter_lines()
            assert await anext(lines) == "event: text"
            loader.engine.die()
            rest = [line async for line in lines]
        assert "event: error" in rest
        assert any("engine_unavailable" in line for line in rest)


class Talking(ScriptedEngine):
    """Emits some text, then hangs until it dies."""

    async def generate(self, *args: Any, on_text: Any = None, **options: Any) -> Any:
        if on_text:
            on_text("half")
        self.hang()
        return await super().generate(*args, **options)


async def test_a_hung_engine_is_killed_and_loaded_again(tmp_path: Path, loader: Loader, monkeypatch: Any):
    killed: list[ScriptedEngine] = []
    monkeypatch.setattr(ScriptedEngine, "kill", lambda engine: (killed.append(engine), engine.die()))
    async with served(tmp_path, loader, engine_canary_s=0.1) as (api, _):
        await api.open()
        loader.engine.hang()
        act = await api.post_act(step=0)
        assert (act.status_code, act.json()["code"]) == (503, "engine_unavailable")
        await reloaded(api, loader, 2)
        assert len(killed) == 1
        assert (await api.act(step=0))["step"] == 0


async def test_idle_hang_is_detected(tmp_path: Path, loader: Loader):
    async with served(tmp_path, loader, engine_canary_s=0.1) as (api, _):
        loader.engine.hang()
        await reloaded(api, loader, 2)


async def test_any_output_resets_the_watchdog(tmp_path: Path, tokenizer: Tokenizer):
    """The queue of this engine is so long that no probe is answered, but the engine makes progress."""

    class Crowded(HeldEngine):
        async def probe(self) -> None:
            await asyncio.Event().wait()

    loader = Loader(tokenizer, Crowded)
    async with served(tmp_path, loader, engine_canary_s=0.2) as (api, _):
        await api.open()
        act = asyncio.create_task(api.post_act(step=0))
        for _ in range(60):
            await asyncio.sleep(0.01)
            loader.engine.heartbeat += 1
        loader.engine.release.set()
        assert (await act).status_code == 200
        assert loader.num_loads == 1


async def test_an_idle_engine_that_answers_its_probes_lives_on(tmp_path: Path, loader: Loader):
    async with served(tmp_path, loader, engine_canary_s=0.05):
        await until(lambda: loader.engine.heartbeat >= 3)
        assert (loader.num_loads, loader.engine.healthy) == (1, True)


async def test_it_gives_up_after_so_many_failures(tmp_path: Path, loader: Loader):
    async with served(tmp_path, loader, engine_max_failures=3) as (api, gave_up):
        for num_loads in (1, 2):
            await reloaded(api, loader, num_loads)
            loader.engine.die()
        await reloaded(api, loader, 3)
        assert not gave_up.is_set()
        loader.engine.die()
        await until(gave_up.is_set)
        assert loader.num_loads == 3


async def test_failures_that_are_long_ago_do_not_count(tmp_path: Path, loader: Loader):
    async with served(tmp_path, loader, engine_max_failures=2, engine_failure_window_s=1e-9) as (api, gave_up):
        for num_loads in range(1, 5):
            await reloaded(api, loader, num_loads)
            loader.engine.die()
        await reloaded(api, loader, 5)
        assert not gave_up.is_set()


async def test_a_load_that_fails_after_a_death_is_tried_again(tmp_path: Path, loader: Loader):
    async with served(tmp_path, loader) as (api, gave_up):
        loader.failing = 2
        loader.engine.die()
        await reloaded(api, loader, 4)
        assert not gave_up.is_set()


async def test_a_store_that_fails_during_a_reload_counts_as_no_failure_of_the_engine(
    tmp_path: Path, loader: Loader, monkeypatch: pytest.MonkeyPatch
):
    async with served(tmp_path, loader, engine_max_failures=2) as (api, gave_up):
        store, num_asked = api.app.state.services.sessions.store, 0

        async def fail() -> Any:
            nonlocal num_asked
            num_asked += 1
            raise StoreUnavailable("no connection")

        monkeypatch.setattr(policies, "_STORE_RETRY_S", 0.0)
        with monkeypatch.context() as failing:
            failing.setattr(store, "catalog", fail)
            loader.engine.die()
            await until(lambda: num_asked > 3)
            assert await ready(api) != "ready"
        await reloaded(api, loader, 2)
        assert not gave_up.is_set()


async def test_a_first_load_that_fails_is_final(tmp_path: Path, loader: Loader):
    loader.failing = 1
    gave_up = asyncio.Event()
    app = create_app(Settings(data=tmp_path, **SOON), engine=loader, store=MemoryStore(), on_fatal=gave_up.set)
    async with app.router.lifespan_context(app):
        await until(gave_up.is_set)
        await asyncio.sleep(0.05)
        assert loader.num_loads == 1


async def test_reload_delay_doubles(tmp_path: Path, loader: Loader, monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def recorded(seconds: float) -> None:
        if seconds >= 100:
            pauses.append(seconds)
            seconds = 0
        await sleep(seconds)

    monkeypatch.setattr("service.engine.supervisor._LONGEST_BACKOFF_S", 300.0)
    monkeypatch.setattr("service.engine.supervisor.asyncio.sleep", recorded)
    async with served(tmp_path, loader, engine_backoff_s=100.0) as (api, _):
        for num_loads in range(1, 4):
            await reloaded(api, loader, num_loads)
            loader.engine.die()
        await reloaded(api, loader, 4)
    assert pauses == [100.0, 200.0, 300.0]


async def test_injected_engine_is_not_reloaded(tmp_path: Path, tokenizer: Tokenizer):
    gave_up = asyncio.Event()
    engine = ScriptedEngine(tokenizer)
    async with serve(tmp_path, engine, on_fatal=gave_up.set, engine_backoff_s=0.0, engine_max_failures=3) as api:
        engine.die()
        await until(gave_up.is_set)
        assert await ready(api) == "engine_unavailable"


async def test_dead_engine_is_garbage_collected(tmp_path: Path, loader: Loader):
    async with served(tmp_path, loader, on_ready=gc.collect) as (api, _):
        await api.open()
        await api.act()
        loader.engine.itself = loader.engine  # a reference cycle, so that only the garbage collector can free it
        dead = weakref.ref(loader.engine)
        loader.engine.die()
        await reloaded(api, loader, 2)
        assert dead() is None


async def test_drain_timeout_aborts_uncommitted_acts(tmp_path: Path, tokenizer: Tokenizer):
    engine = HeldEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        await api.open()
        await api.open("f")
        body = {"episode_id": "f", "observation": "x", "step": 0}
        stream = api.client.post("/act", json=body, headers={"Accept": "text/event-stream"})
        calls = [asyncio.create_task(call) for call in (api.post_act(step=0), api.post_act(step=0), stream)]
        await until(lambda: engine.num_held == 2)
        api.app.state.services.lifecycle.enter(Phase.DRAINING)
        assert await api.app.state.services.sessions.abort_acts() == 2
        for call in calls[:2]:
            assert _status_and_code(await call) == (503, "draining")
        streamed = await calls[2]  # its headers were sent when the act began to wait for the engine
        assert (streamed.status_code, '"code":"draining"' in streamed.text) == (200, True)
        assert engine.num_aborted == 2
        assert [(await api.get(name))["step"] for name in ("e", "f")] == [0, 0]


async def test_a_commit_that_began_is_never_aborted(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: Any):
    async with serve(tmp_path, ScriptedEngine(tokenizer)) as api:
        await api.open()
        sessions, at_commit, go = api.app.state.services.sessions, asyncio.Event(), asyncio.Event()
        commit = sessions.store.commit

        async def slow(change: Any) -> None:
            at_commit.set()
            await go.wait()
            await commit(change)

        monkeypatch.setattr(sessions.store, "commit", slow)
        act = asyncio.create_task(api.post_act(step=0))
        await at_commit.wait()
        assert await sessions.abort_acts() == 0
        go.set()
        assert (await act).status_code == 200
        assert (await api.get())["step"] == 1


async def test_an_act_that_is_launched_as_the_others_are_aborted(tmp_path: Path, tokenizer: Tokenizer):
    engine = HeldEngine(tokenizer)
    async with serve(tmp_path, engine) as api:
        await api.open()
        await api.app.state.services.sessions.abort_acts()
        assert _status_and_code(await api.post_act(step=0)) == (503, "draining")
        assert engine.num_held == 0


def _status_and_code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize("failure", [RuntimeError("cannot be closed"), asyncio.CancelledError(), None])
async def test_a_failure_of_the_supervisor_itself_ends_the_process(
    tmp_path: Path, loader: Loader, monkeypatch: Any, failure: BaseException | None
):
    monkeypatch.setattr(supervisor, "_CLOSE_S", 0.1)
    async with served(tmp_path, loader) as (_, gave_up):

        async def broken() -> None:
            if failure is None:
                await asyncio.Event().wait()  # closing the engine hangs
            else:
                raise failure

        monkeypatch.setattr(loader.engine, "close", broken)
        loader.engine.die()
        async with asyncio.timeout(5):
            await gave_up.wait()


async def test_an_engine_that_cannot_be_watched_is_loaded_again(tmp_path: Path, loader: Loader, monkeypatch: Any):
    async def broken(*_: Any) -> None:
        raise RuntimeError("cannot be watched")

    with monkeypatch.context() as patched:
        patched.setattr(ScriptedEngine, "watch", broken)
        async with served(tmp_path, loader, engine_max_failures=4) as (_, gave_up):
            await until(gave_up.is_set)
            assert loader.num_loads == 4
    with monkeypatch.context() as patched:
        patched.setattr("service.engine.watchdog.hung", broken)
        killed: list[ScriptedEngine] = []
        patched.setattr(ScriptedEngine, "kill", lambda engine: (killed.append(engine), engine.die()))
        async with served(tmp_path, loader, engine_max_failures=4) as (_, gave_up):
            await until(gave_up.is_set)
            assert (loader.num_loads, killed) == (8, [])


@pytest.mark.parametrize("failure", [EngineRefused("no"), RuntimeError("no"), None])
async def test_the_lifecycle_knows_whether_an_engine_is_being_loaded(
    tmp_path: Path, loader: Loader, failure: Exception | None
):
    gave_up, loading = asyncio.Event(), []

    async def load() -> ScriptedEngine:
        loading.append(app.state.services.lifecycle.is_loading_engine)
        if failure:
            raise failure
        return await loader()

    app = create_app(
        Settings(data=tmp_path, **SOON),
        engine=load,
        store=MemoryStore(),
        on_fatal=gave_up.set,
        on_ready=gave_up.set,
    )
    async with app.router.lifespan_context(app):
        await until(gave_up.is_set)
        assert loading == [True]
        assert not app.state.services.lifecycle.is_loading_engine


async def test_a_load_that_the_shutdown_interrupts_still_runs(tmp_path: Path, loader: Loader):
    loader.may_load.clear()
    app = create_app(Settings(data=tmp_path, **SOON), engine=loader, store=MemoryStore())
    async with app.router.lifespan_context(app):
        await until(lambda: loader.num_loads)
    assert app.state.services.lifecycle.is_loading_engine
