"""The command `episodic serve`: checks the API keys, then runs the server until a signal or an engine failure."""

import asyncio
import gc
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from service.access.keys import SCOPES, KeyRefused, Keyring, make_known, new_key, record_of
from service.api.http import server
from service.api.http.security import is_loopback
from service.api.http.shutdown import FINAL_RESPONSES_S, DrainingServer, end
from service.app import create_app
from service.cli.options import Store, read_settings
from service.observability import logs
from service.sessions.profiles import ProfileError
from service.settings import Settings
from service.store.base import StoreRefused, StoreUnavailable
from service.store.sql import SQLStore
from service.trajectory import DEFAULT_TENANT


def serve_command(
    model: Annotated[
        str | None, typer.Option(help="Model to serve: a packaged policy, a folder or a Hugging Face id.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. 0 picks a free port.")] = None,
    store: Store = None,
    config: Annotated[Path | None, typer.Option(help="Path of a TOML file with settings.")] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Option of the vLLM engine, NAME=VALUE. Can be repeated.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(help="Format of log lines: console or json.")] = None,
) -> None:
    """Serve the policy over HTTP.

    Further settings are EPISODIC_* variables or keys of the TOML file: `episodic settings` lists them."""
    given = {"model": model, "host": host, "port": port, "store": store, "config": config, "log_format": log_format}
    settings = read_settings(given, dict(_pair(option) for option in engine or []))
    logs.configure(settings.log_format, settings.log_level)
    try:
        asyncio.run(_prepare_keys(settings))
        raise typer.Exit(_serve(settings))
    except KeyRefused as error:
        typer.secho(f"admin_key: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    except ProfileError as error:
        typer.secho(f"profiles: {error}", fg="red", err=True)
        raise typer.Exit(2) from error
    except (StoreRefused, StoreUnavailable) as error:
        typer.secho(f"store: {error}", fg="red", err=True)
        raise typer.Exit(2) from error


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
                _refuse_to_serve_others(settings.host)
            key, made = new_key(DEFAULT_TENANT, SCOPES, now)
            await store.add_key(made)
            typer.echo(key)
            usage = "send Authorization: Bearer KEY; for episodic commands, set EPISODIC_API_KEY=KEY"
            typer.echo(f"^ the new API key, printed only this once. To use it, {usage}")


def _refuse_to_serve_others(host: str) -> NoReturn:
    typer.secho(
        f"host {host}: without API keys the service listens only on loopback addresses (127.0.0.1, ::1, localhost). "
        "Create a key: episodic keys create --tenant NAME",
        fg="red",
        err=True,
    )
    raise typer.Exit(2)


def _serve(settings: Settings) -> int:
    """Runs the server. Returns the exit code: 0 after a signal, 1 if the engine failed or the port is not available."""
    failed = False

    def fail() -> None:
        nonlocal failed
        failed = True
        running.should_exit = True

    served = create_app(settings, on_ready=_freeze_garbage_collector, on_fatal=fail)
    config = server.config(
        served,
        host=settings.host,
        port=settings.port,
        lifespan="off",  # DrainingServer runs the lifespan itself
        timeout_graceful_shutdown=FINAL_RESPONSES_S,
    )
    running = DrainingServer(config, drain_delay_s=settings.drain_delay_s, drain_s=settings.drain_s)
    try:
        running.run()
    except SystemExit:  # uvicorn raises it if it cannot listen, after logging the reason
        failed = True
    if served.state.services.lifecycle.is_loading_engine:
        end(int(failed))  # the thread that loads the engine cannot be interrupted and would keep the process alive
    return int(failed)


def _freeze_garbage_collector() -> None:
    """Excludes all objects loaded so far from garbage collection, because they live as long as the process.

    Objects of an engine that failed earlier are unfrozen and collected first.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
