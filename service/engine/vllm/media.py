"""Owns what /v1 may fetch and decode: vLLM's media connector, held to hosts that are allowed, to public addresses, and
to images that fit in memory.

Imports vllm, and is imported where vLLM is served alone.
"""

import asyncio
import ipaddress
import os
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver
from PIL.Image import DecompressionBombError, DecompressionBombWarning
from urllib3.util import parse_url
from vllm.connections import HTTPConnection
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector

MAX_PIXELS = 1 << 24
"""Of an image, or of a frame; 48 MiB as RGB. A packed image of a few kilobytes may have more."""


class MediaRefused(ValueError):
    """Media that must not be fetched; the message says why."""


def guard(hosts: Sequence[str]) -> None:
    """From now on vLLM fetches media through a connector that allows these hosts alone."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(connector(hosts))
    os.environ.setdefault("VLLM_MAX_IMAGE_PIXELS", str(MAX_PIXELS))  # looked at after Pillow's, which is too generous


def connector(hosts: Sequence[str]) -> type[MediaConnector]:
    """vLLM's connector that fetches from these hosts at public addresses; no redirect and no file."""
    connection = _Connection()

    class Guarded(MediaConnector):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "connection": connection})

        def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
            _check(url, hosts)
            if _is_data(url):
                with _no_bombs():
                    return super().load_from_url(url, media_io, **options)
            raise MediaRefused("media is fetched asynchronously only")

        async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
            _check(url, hosts)
            if _is_data(url):
                with _no_bombs():
                    return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)
            limit = media_io.get_max_bytes()
            options: dict[str, Any] = {"timeout": fetch_timeout, "allow_redirects": False, "max_bytes": limit}
            try:
                data = await self.connection.async_get_bytes(url, **options)
            except (OSError, aiohttp.ClientError, TimeoutError) as error:
                raise MediaRefused(f"the media cannot be fetched: {type(error).__name__}") from error
            with _no_bombs():
                return await asyncio.to_thread(media_io.load_bytes, data)

    return Guarded


@contextmanager
def _no_bombs() -> Generator[None]:
    """Pillow's own limit is a failure to vLLM, and not the caller's fault."""
    try:
        yield
    except (DecompressionBombError, DecompressionBombWarning) as error:
        raise MediaRefused("the image has too many pixels") from error


def is_public(address: str) -> bool:
    """Whether an IP address, or the IPv4 one that it stands for, is everyone's to reach."""
    found = ipaddress.ip_address(address.partition("%")[0])
    meant = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None) or found
    return meant.is_global and not meant.is_multicast


class _PublicResolver(AbstractResolver):
    """Answers with public addresses alone. The connection is made to what it answers, so that a name which resolves
    otherwise a moment later gains nothing."""

    def __init__(self) -> None:
        self._resolver = DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = [answer for answer in await self._resolver.resolve(host, port, family) if is_public(answer["host"])]
        if not found:
            raise OSError(None, f"{host} has no public address")
        return found

    async def close(self) -> None:
        await self._resolver.close()


class _Connection(HTTPConnection):
    async def get_async_client(self) -> aiohttp.ClientSession:
        if self._async_client is None:
            public = aiohttp.TCPConnector(resolver=_PublicResolver(), use_dns_cache=False)
            self._async_client = aiohttp.ClientSession(connector=public, trust_env=False)
        return self._async_client


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _check(url: str, hosts: Sequence[str]) -> None:
    if _is_data(url):
        return
    parts = parse_url(url)
    if parts.scheme not in ("http", "https"):
        raise MediaRefused("media must be a data: URL, or an http(s) URL of an allowed host")
    host = (parts.hostname or "").strip("[]").lower()
    if host not in hosts:
        raise MediaRefused(f"media by URL is off for the host {host[:100]!r} (EPISODIC_MEDIA_HOSTS)")
    if _is_address(host) and not is_public(host):  # the resolver is asked for names alone
        raise MediaRefused(f"{host} is not a public address")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
