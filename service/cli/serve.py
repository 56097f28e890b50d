"""`episodic serve`: API keys before the port opens, then the server until a signal or the loss of the engine."""

import asyncio
import gc
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from service.access.keys import SCOPES, KeyRefused, Keyring, make_known, new_key, record_of
from service.api.http import server
from service.api.http.security import is_loopback
from service.api.http.shutdown import LAST_ANSWERS_S, DrainingServer, end
from service.app import create_app
from service.cli.options import Store, read_settings
from service.observability import logs
from service.sessions.profiles import ProfileError
from service.settings import Settings
from service.store.base import StoreRefused, StoreUnavailable
from service.store.sql import SQLStore
from service.trajectory import DEFAULT_TENANT


def serve_command(
    model: Annotated[str | None, typer.Option(help="A packaged policy, a folder, or a Hugging Face model id.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to serve on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to serve on.")] = None,
    store: Store = None,
    config: Annotated[Path | None, typer.Option(help="A TOML file with settings.")] = None,
    engine: Annotated[list[str] | None, typer.Option(help="A vLLM engine option, NAME=VALUE; may be repeated.")] = None,
    log_format: Annotated[str | None, typer.Option(help="console or json.")] = None,
) -> None:
    """Serves the policy over HTTP. Every setting is also an EPISODIC_* variable and a key of the TOML file."""
    given = {"model": model, "host": host, "port": port, "store": store, "config": config, "log_format": log_format}
    settings = read_settings(given, dict(_pair(option) for option in engine or []))
    logs.configure(settings.log_format, settings.log_level)
    try:
        asyncio.run(_settle_keys(settings))
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
        raise typer.BadParameter(f"{option!r} is not NAME=VALUE", param_hint="--engine")
    return name, value


async def _settle_keys(settings: Settings) -> None:
    """Without API keys nobody but this machine may connect. Makes the admin key known, or one where it may."""
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
            typer.echo("^ the API key, shown this once: send Authorization: Bearer KEY, or set EPISODIC_API_KEY=KEY")


def _refuse_to_serve_others(host: str) -> NoReturn:
    typer.secho(
        f"host {host}: without API keys the service serves loopback only (127.0.0.1, ::1, localhost). "
        "Make one: episodic keys create --tenant NAME",
        fg="red",
        err=True,
    )
    raise typer.Exit(2)


def _serve(settings: Settings) -> int:
    """Runs until a signal (0), or until there is no engine any more or no port (1)."""
    failed = False

    def fail() -> None:
        nonlocal failed
        failed = True
        running.should_exit = True

    served = create_app(settings, on_ready=_settle, on_fatal=fail)
    config = server.config(
        served,
        host=settings.host,
        port=settings.port,
        lifespan="off",  # the server below runs it
        timeout_graceful_shutdown=LAST_ANSWERS_S,
    )
    running = DrainingServer(config, drain_delay_s=settings.drain_delay_s, drain_s=settings.drain_s)
    try:
        running.run()
    except SystemExit:  # uvicorn's, which has said why it cannot listen
        failed = True
    if served.state.services.lifecycle.is_loading_engine:
        end(int(failed))  # a thread loads on, and nothing else would interrupt it
    return int(failed)


def _settle() -> None:
    """What is loaded stays, and the collector need not walk it again; an engine that died goes."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
