"""Unpacks an adapter that a caller uploads as a tar archive. Only its two files are written."""

import io
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from service.engine.adapters import CONFIG, WEIGHTS, AdapterRefused

_MAX_MEMBERS = 1000
_CHUNK = 1 << 20


class _Reader(io.FileIO):
    """Reads at most 1 MiB at once, because tarfile reads the whole of a header that may be as long as the archive."""

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]  # typeshed has None in the result
        if size is None or not 0 <= size <= _CHUNK:
            raise tarfile.ReadError("a header of the archive is too long")
        return super().read(size) or b""


def unpack(archive: Path, into: Path) -> None:
    """Writes the two files of the adapter in an uncompressed tar archive into the folder `into`.

    The archive may contain folders and other files, such as a model card. They are ignored. Raises AdapterRefused if
    the archive is damaged, or contains a link, a device, a path out of the archive, or not exactly one adapter. Raises
    OSError if the files cannot be written.
    """
    try:
        with _Reader(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for name, member in _members(tar).items():
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                with content, (into / name).open("xb") as target:
                    shutil.copyfileobj(content, target, _CHUNK)
    except (tarfile.TarError, ValueError) as error:
        detail = f"the upload is not a complete, uncompressed tar archive: {str(error)[:200]}"
        raise AdapterRefused(detail) from error


def _members(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """Returns the entries of the adapter's files, by name."""
    found: dict[str, tarfile.TarInfo] = {}
    for number, member in enumerate(tar):
        if number == _MAX_MEMBERS:
            raise AdapterRefused(f"the archive has more than {_MAX_MEMBERS} entries")
        path = PurePosixPath(member.name)
        shown = member.name[:200]
        if path.is_absolute() or ".." in path.parts:
            raise AdapterRefused(f"the archive contains {shown!r}: a path must stay inside the archive")
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise AdapterRefused(f"the archive contains {shown!r}, which is not a plain file (a link or a device)")
        if path.name in (CONFIG, WEIGHTS):
            if path.name in found:
                raise AdapterRefused(f"the archive contains {path.name} twice; send one adapter")
            found[path.name] = member
    if missing := {CONFIG, WEIGHTS} - found.keys():
        raise AdapterRefused(f"the archive has no {min(missing)}")
    if len({PurePosixPath(member.name).parent for member in found.values()}) > 1:
        raise AdapterRefused(f"{CONFIG} and {WEIGHTS} are in different folders of the archive")
    return found
