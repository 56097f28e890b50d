"""Restricts the media that /v1 may fetch and decode, to prevent SSRF and decompression bombs.

vLLM fetches media through a connector. The connector here allows only configured hosts with public addresses, and only
images that fit into memory. This module imports vLLM. It is only imported when the app of /v1 is built.
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
"""Maximum pixels of an image or a frame (48 MiB as RGB). A compressed image of a few kilobytes can have more."""


class MediaRefused(ValueError):
    """The media may not be fetched or decoded. The message says why."""


def guard(hosts: Sequence[str]) -> None:
    """Makes vLLM fetch media through a connector that allows only these hosts."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(connector(hosts))
    os.environ.setdefault("VLLM_MAX_IMAGE_PIXELS", str(MAX_PIXELS))  # stricter than Pillow's own limit


def connector(hosts: Sequence[str]) -> type[MediaConnector]:
    """Returns a connector for vLLM that fetches only from these hosts, only at public addresses, without redirects.

    It also accepts data: URLs, but no files.
    """
    connection = _Connection()

    class Guarded(MediaConnector):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "connection": connection})

        def load_from_url(self, url: str, media_io: Any, **options: Any) -> Any:
            _check(url, hosts)
            if _is_data(url):
                with _no_bombs():
                    return super().load_from_url(url, media_io, **options)
            raise MediaRefused("media can only be fetched asynchronously")

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
    """Turns Pillow's error for too many pixels into MediaRefused, because vLLM would answer it with status 500."""
    try:
        yield
    except (DecompressionBombError, DecompressionBombWarning) as error:
        raise MediaRefused("the image has too many pixels; send a smaller one") from error


_UNICAST = ipaddress.IPv6Network("2000::/3")
"""The IPv6 addresses that IANA assigns to the public Internet. All others are private, or translated to IPv4."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv4 addresses as IPv6 networks without IPv4 see them (RFC 6052)."""


def is_public(address: str) -> bool:
    """Returns whether an IP address is public. If an IPv6 address embeds an IPv4 address, the latter is checked."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF) if found in _NAT64 else None
        embedded = found.ipv4_mapped or found.sixtofour or nat64
        if embedded is None and found not in _UNICAST:
            return False
        found = embedded or found
    return found.is_global and not found.is_multicast


class _PublicResolver(AbstractResolver):
    """Resolves host names to public addresses only.

    The connection uses the addresses that this resolver has checked. So an attacker gains nothing if the name resolves
    to another address a moment later (DNS rebinding).
    """

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
        raise MediaRefused("media must be a data: URL, or an http(s) URL with a host that EPISODIC_MEDIA_HOSTS allows")
    host = (parts.hostname or "").strip("[]").lower()
    if host not in hosts:
        raise MediaRefused(
            f"media may not be fetched from the host {host[:100]!r}: EPISODIC_MEDIA_HOSTS does not allow it"
        )
    if _is_address(host) and not is_public(host):  # checked here, because the resolver is not called for addresses
        raise MediaRefused(f"media may not be fetched from {host}: it is not a public address")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
