"""The command `episodic serve`: checks the API keys, then runs the server until a signal or an engine failure."""

import asyncio
import contextlib
import errno
import gc
import socket
import time
from pathlib import Path
from typing import Annotated

import typer

from service.access.keys import SCOPES, KeyRefused, Keyring, make_known, new_key, record_of
from service.api.http import server
from service.api.http.security import is_loopback
from service.api.http.shutdown import FINAL_RESPONSES_S, DrainingServer, end
from service.app import create_app
from service.cli.open_files import raise_limit
from service.cli.options import Store, fail, read_settings, store_variable
from service.cli.setting_errors import unknown
from service.engine.base import EngineRefused
from service.engine.model_check import check_model
from service.observability import logs
from service.sessions.profiles import ProfileError
from service.settings import Settings
from service.store.base import StoreRefused, StoreUnavailable
from service.store.sql import SQLStore
from service.trajectory import DEFAULT_TENANT

_log = logs.get(__name__)


def serve_command(
    model: Annotated[
        str | None,
        typer.Option(
            help="Model to serve: a packaged policy, a folder or a Hugging Face id (EPISODIC_MODEL).",
            rich_help_panel="Model",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Option of the vLLM engine, NAME=VALUE (EPISODIC_ENGINE__NAME). Can be repeated.",
            rich_help_panel="Model",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on. Addresses other than loopback need API keys (EPISODIC_HOST).",
            rich_help_panel="Network",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on. 0 picks a free port (EPISODIC_PORT).", rich_help_panel="Network"),
    ] = None,
    store: Store = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Path of a TOML file with settings (EPISODIC_CONFIG).", rich_help_panel="Settings and logs"),
    ] = None,
    log_format: Annotated[
        str | None,
        typer.Option(
            help="Format of log lines: console or json (EPISODIC_LOG_FORMAT).", rich_help_panel="Settings and logs"
        ),
    ] = None,
) -> None:
    """Serve the policy over HTTP.

    Further settings are EPISODIC_* variables or keys of the TOML file: `episodic settings` lists them.
    `episodic doctor` checks the machine and the settings."""
    given = {"model": model, "host": host, "port": port, "store": store, "config": config, "log_format": log_format}
    settings = read_settings(given, dict(_pair(option) for option in engine or []))
    logs.configure(settings.log_format, settings.log_level)
    raise_limit()
    for name, meant in unknown(settings):
        _log.warning("unknown_setting", name=name, did_you_mean=meant)
    if settings.adapters and not settings.adapters.is_dir():
        fail(f"EPISODIC_ADAPTERS: the folder {settings.adapters} does not exist")
    try:
        check_model(settings)
        asyncio.run(_prepare_keys(settings))
        raise typer.Exit(_serve(settings))
    except EngineRefused as error:
        fail(str(error))
    except KeyRefused as error:
        fail(f"EPISODIC_ADMIN_KEY: {error}")
    except ProfileError as error:
        fail(f"EPISODIC_PROFILES: {error}")
    except (StoreRefused, StoreUnavailable) as error:
        fail(f"{store_variable(settings)}: {error}")


def _pair(option: str) -> tuple[str, str]:
    name, equals, value = option.partition("=")
    if not equals:
        raise typer.BadParameter(f"expected NAME=VALUE, got {option!r}", param_hint="--engine")
    return name, value


async def _prepare_keys(settings: Settings) -> None:
    """Adds the admin key to the store, or creates a key if `make_key` allows it.

    Exits with code 2 if the address is not loopback and the store has no key: without keys every caller is accepted.
    """
    record, now = None, time.time()
    if settings.admin_key is not None:
        record = record_of(settings.admin_key.get_secret_value(), DEFAULT_TENANT, SCOPES, now)
    elif is_loopback(settings.host):
        return
    async with SQLStore(settings.store_url) as store:
        if record is not None:
            await make_known(store, record)
        elif not await Keyring(store).exists():
            if not settings.make_key:
                loopback = "without API keys the service listens only on loopback addresses (127.0.0.1, ::1, localhost)"
                create = "Create a key with `episodic keys create --tenant NAME`, or set EPISODIC_MAKE_KEY=true."
                fail(f"EPISODIC_HOST: {settings.host} is not allowed: {loopback}. {create}")
            key, made = new_key(DEFAULT_TENANT, SCOPES, now)
            await store.add_key(made)
            typer.echo(key)
            usage = "send Authorization: Bearer KEY. For `episodic` commands, set EPISODIC_API_KEY=KEY."
            typer.echo(f"The line above is the new API key. It is printed only once. To use it, {usage}")


def _serve(settings: Settings) -> int:
    """Runs the server. Returns the exit code: 0 after a signal, 1 if the engine failed."""
    with contextlib.ExitStack() as stack:
        try:
            sockets = [stack.enter_context(opened) for opened in server.listen(settings.host, settings.port)]
        except OSError as error:
            fail(listen_fault(settings, error))
        port = sockets[0].getsockname()[1]  # the free one, if the setting is 0
        return _run(settings.model_copy(update={"port": port}), sockets)


def _run(settings: Settings, sockets: list[socket.socket]) -> int:
    failed = False

    def give_up() -> None:
        nonlocal failed
        failed = True
        running.should_exit = True

    served = create_app(settings, on_ready=tune_garbage_collector, on_fatal=give_up)
    # DrainingServer runs the lifespan itself.
    config = server.config(served, lifespan="off", timeout_graceful_shutdown=FINAL_RESPONSES_S)
    running = DrainingServer(config, drain_delay_s=settings.drain_delay_s, drain_s=settings.drain_s)
    running.run(sockets)
    if served.state.services.lifecycle.is_loading_engine:
        end(int(failed))  # the thread that loads the engine cannot be interrupted and would keep the process alive
    return int(failed)


def listen_fault(settings: Settings, error: OSError) -> str:
    """Says why the service cannot listen on its address, and what to do."""
    address = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return f"EPISODIC_PORT: {address} is in use. Stop the program that uses it, or choose another port."
    if error.errno == errno.EACCES:
        return f"EPISODIC_PORT: {address} needs root's rights. Choose a port from 1024."
    return f"EPISODIC_HOST: cannot listen on {address}: {error.strerror}. Choose an address of this machine."


def tune_garbage_collector() -> None:
    """Excludes all objects loaded so far from garbage collection, because they live as long as the process.

    Objects of an engine that failed earlier are unfrozen and collected first. Later objects are collected in larger
    lots: hardly any are in cycles, and with Python's default lot of 700 objects a tenth of an act's time would go into
    looking for them.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
