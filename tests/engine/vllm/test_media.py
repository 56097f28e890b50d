"""Media that /v1 may fetch: data: URLs, and URLs of allowed hosts with public addresses."""

import base64
import socket
import struct
import zlib
from typing import Any

import pytest

from service.engine.vllm.media import MAX_PIXELS, MediaRefused, connector, guard, is_public


class Bytes:
    """Implements vLLM's MediaIO. Returns the data without decoding it."""

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
        ("2002:5db8:d822::", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::7f00:1", False),
        ("::7f00:1", False),
        ("::5db8:d822", False),
        ("::ffff:0:7f00:1", False),
        ("2001:0:4136:e378:8000:63bf:80ff:fffe", False),
        ("ff0e::1", False),
    ],
)
def test_addresses(address: str, public: bool):
    assert is_public(address) == public


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "data: URL"),
        ("ftp://media.example/x", "data: URL"),
        ("https://other.example/x", "does not allow it"),
        ("https://media.example@other.example/x", "does not allow it"),
        ("http://127.0.0.1/x", "not a public address"),
        ("http://[::1]/x", "not a public address"),
    ],
)
async def test_refused_urls(url: str, message: str):
    fetcher: Any = connector(["media.example", "127.0.0.1", "::1"])()
    with pytest.raises(MediaRefused, match=message):
        await fetcher.load_from_url_async(url, Bytes())
    with pytest.raises(MediaRefused, match=message):
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


def _png(width: int, height: int) -> str:
    """Returns a white image with one bit per pixel, as a data: URL of a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compressobj(9)
    row = b"\x00" + b"\xff" * -(-width // 8)
    data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()


@pytest.mark.parametrize(("side", "fits"), [(64, True), (5_000, False), (14_000, False), (20_000, False)])
async def test_an_image_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch, side: int, fits: bool):
    from vllm.multimodal.media import ImageMediaIO

    monkeypatch.delenv("VLLM_MAX_IMAGE_PIXELS", raising=False)
    guard([])
    url = _png(side, side)
    assert len(url) < 200_000
    assert (side * side <= MAX_PIXELS) == fits
    fetcher: Any = connector([])()
    if fits:
        assert (await fetcher.load_from_url_async(url, ImageMediaIO())).media.size == (side, side)
        return
    with pytest.raises(ValueError, match="pixels"):  # vLLM answers a ValueError with status 400
        await fetcher.load_from_url_async(url, ImageMediaIO())
    with pytest.raises(ValueError, match="pixels"):
        fetcher.load_from_url(url, ImageMediaIO())
