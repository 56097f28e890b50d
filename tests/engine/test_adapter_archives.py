"""Uploads of adapters: what is unpacked from a tar archive, and which archives are refused."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from service.engine import adapter_archives
from service.engine.adapter_archives import unpack
from service.engine.adapters import CONFIG, WEIGHTS, AdapterRefused

Entry = tuple[str, bytes] | tarfile.TarInfo


def tar(*entries: Entry, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            archive.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BOTH: tuple[Entry, Entry] = ((CONFIG, b"config"), (WEIGHTS, b"w" * 5000))


def unpacked(content: bytes, tmp_path: Path) -> dict[str, bytes]:
    archive, folder = tmp_path / "upload.tar", tmp_path / "into" / "folder"
    archive.write_bytes(content)
    folder.mkdir(parents=True)
    unpack(archive, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "upload.tar"]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "entries",
    [
        BOTH,
        (special(".", tarfile.DIRTYPE), ("./" + CONFIG, b"config"), ("./" + WEIGHTS, b"w" * 5000)),
        (
            special("w", tarfile.DIRTYPE),
            ("w/" + WEIGHTS, b"w" * 5000),
            ("w/README.md", b"#"),
            ("w/" + CONFIG, b"config"),
        ),
    ],
)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_only_the_two_files_are_unpacked(tmp_path: Path, entries: tuple[Entry, ...], format: int):
    assert unpacked(tar(*entries, format=format), tmp_path) == {CONFIG: b"config", WEIGHTS: b"w" * 5000}


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(CONFIG, "config")
        archive.writestr(WEIGHTS, "w")
    return buffer.getvalue()


def compressed() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo(CONFIG))
    return buffer.getvalue()


def with_a_long_header() -> bytes:
    info = tarfile.TarInfo(CONFIG)
    info.pax_headers = {"comment": "x" * (2 << 20)}
    return tar(info)


def sparse() -> bytes:
    info = tarfile.TarInfo(WEIGHTS)
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 50)}
    return tar(BOTH[0], info)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (lambda: b"", "not a complete"),
        (lambda: b"\0" * 10240, "no adapter_config.json"),
        (lambda: b"no archive" * 200, "not a complete"),
        (zipped, "not a complete"),
        (compressed, "not a complete"),
        (lambda: tar(*BOTH)[:4000], "not a complete"),
        (lambda: tar(*BOTH)[:700], "not a complete"),
        (lambda: tar(BOTH[0]), "no adapter_model.safetensors"),
        (lambda: tar(*BOTH, ("other/" + CONFIG, b"config")), "adapter_config.json twice"),
        (lambda: tar(("a/" + CONFIG, b"c"), ("b/" + WEIGHTS, b"w")), "different folders"),
        (lambda: tar(*BOTH, ("../outside", b"x")), "inside the archive"),
        (lambda: tar(("../" + CONFIG, b"x"), BOTH[1]), "inside the archive"),
        (lambda: tar(("/etc/" + CONFIG, b"x"), BOTH[1]), "inside the archive"),
        (lambda: tar(BOTH[0], special(WEIGHTS, tarfile.SYMTYPE, "/etc/passwd")), "not a plain file"),
        (lambda: tar(BOTH[0], special(WEIGHTS, tarfile.LNKTYPE, CONFIG)), "not a plain file"),
        (lambda: tar(BOTH[0], special(WEIGHTS, tarfile.CHRTYPE)), "not a plain file"),
        (lambda: tar(*BOTH, special("pipe", tarfile.FIFOTYPE)), "not a plain file"),
        (sparse, "not a plain file"),
        (with_a_long_header, "not a complete"),
        (lambda: tar(*((f"file-{n}", b"") for n in range(1001)), *BOTH), "more than 1000 entries"),
    ],
)
def test_what_is_not_one_adapter_is_refused(tmp_path: Path, content: Callable[[], bytes], word: str):
    with pytest.raises(AdapterRefused, match=word):
        unpacked(content(), tmp_path)
    assert not (tmp_path / "outside").exists()


def test_no_header_is_read_into_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    largest = 0
    read = adapter_archives._Reader.read

    def recorded(self: adapter_archives._Reader, size: int | None = -1) -> bytes:
        nonlocal largest
        found = read(self, size)
        largest = max(largest, len(found))
        return found

    monkeypatch.setattr(adapter_archives._Reader, "read", recorded)
    with pytest.raises(AdapterRefused):
        unpacked(with_a_long_header(), tmp_path)
    assert largest <= 1 << 20
