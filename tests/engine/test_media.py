"""What /v1 may fetch: data URLs, and allowed hosts at public addresses."""

import socket
from typing import Any

import pytest

from service.engine.media import MediaRefused, connector, is_public


class Bytes:
    """vLLM's MediaIO, reduced to the bytes."""

    def load_bytes(self, data: bytes) -> bytes:
        return data

    def load_base64(self, media_type: str, data: str) -> str:
        return data

    def get_max_bytes(self) -> int:
        return 1 << 20


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),  # noqa: S104
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_addresses(address: str, public: bool):
    assert is_public(address) == public


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "data: URL"),
        ("ftp://media.example/x", "data: URL"),
        ("https://other.example/x", "off for the host"),
        ("https://media.example@other.example/x", "off for the host"),
        ("http://127.0.0.1/x", "not a public address"),
        ("http://[::1]/x", "not a public address"),
    ],
)
async def test_refused_urls(url: str, words: str):
    fetcher: Any = connector(["media.example", "127.0.0.1", "::1"])()
    with pytest.raises(MediaRefused, match=words):
        await fetcher.load_from_url_async(url, Bytes())
    with pytest.raises(MediaRefused, match=words):
        fetcher.load_from_url(url, Bytes())


async def test_an_allowed_name_at_a_private_address_is_not_connected_to(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        async def getaddrinfo(*_: Any, **__: Any) -> Any:
            return found

        monkeypatch.setattr("asyncio.base_events.BaseEventLoop.getaddrinfo", getaddrinfo)
        fetcher: Any = connector(["media.example"])()
        listener.settimeout(0.2)
        with pytest.raises(MediaRefused, match="cannot be fetched"):
            await fetcher.load_from_url_async(f"http://media.example:{port}/x", Bytes(), fetch_timeout=2)
        with pytest.raises(TimeoutError):
            listener.accept()
        await (await fetcher.connection.get_async_client()).close()


async def test_data_urls_are_read():
    fetcher: Any = connector([])()
    assert await fetcher.load_from_url_async("data:image/png;base64,aGk=", Bytes()) == "aGk="
