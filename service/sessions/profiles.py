"""Profiles: presets for POST /episode in TOML files, the packaged ones and those in a folder of the operator's."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson
from pydantic import BaseModel, ValidationError

from service.errors import Unprocessable
from service.validation import strict_json

PACKAGED = Path(__file__).parents[1] / "packaged" / "profiles"
_MERGED = ("sampling", "context", "reasoning", "metadata")
"""Objects of which a caller may override one key and keep the others; all else is replaced whole."""


class ProfileError(ValueError):
    """A profile that cannot be; the message names its file and says why."""


@dataclass(frozen=True, slots=True)
class Profile:
    """`fields` are those of POST /episode, the ones of the profile it extends among them."""

    name: str
    description: str
    fields: Mapping[str, Any]


class Profiles:
    """The profiles in the packaged folder and in `folder`, whose files win. Files that begin with _ are ignored."""

    def __init__(self, fields: type[BaseModel], folder: Path | None = None) -> None:
        """`fields`: the model that a profile's fields must be valid under. Raises ProfileError."""
        if folder is not None and not folder.is_dir():
            raise ProfileError(f"there is no folder {folder}")
        folders = [PACKAGED, folder] if folder else [PACKAGED]
        files = {path.stem: path for place in folders for path in sorted(place.glob("[!_]*.toml"))}
        self._fields = fields
        self._read = {name: _read(path) for name, path in files.items()}
        self._profiles = {name: self._resolved(name) for name in sorted(files)}

    def __iter__(self) -> Iterator[Profile]:
        return iter(self._profiles.values())

    def fill(self, document: dict[str, Any]) -> dict[str, Any]:
        """The body of POST /episode with the fields of the profile that it names. Raises Unprocessable."""
        name = document.get("profile")
        if name is None:
            return document
        if not isinstance(name, str) or name not in self._profiles:
            raise Unprocessable(f"there is no profile {str(name)[:128]!r}", "profile")
        return _merged(self._profiles[name].fields, document)

    def _resolved(self, name: str) -> Profile:
        chain: list[str] = []
        base: str | None = name
        while base is not None:
            if base in chain:
                raise ProfileError(f"profile {name!r} extends itself: {' -> '.join([*chain, base])}")
            if base not in self._read:
                raise ProfileError(f"profile {chain[-1]!r} extends {base!r}, which is not there")
            chain.append(base)
            base = self._read[base].get("extends")
        fields: dict[str, Any] = {}
        for link in reversed(chain):
            fields = _merged(fields, {k: v for k, v in self._read[link].items() if k not in ("description", "extends")})
        try:
            self._fields.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ProfileError(f"profile {name!r}: {where}: {first['msg']}") from error
        try:
            kept = orjson.loads(strict_json.dump(fields))
        except ValueError as error:
            raise ProfileError(f"profile {name!r}: {error}") from error
        return Profile(name, self._read[name].get("description", ""), kept)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ProfileError(f"profile {path.name}: {error}") from error
    for key in ("description", "extends"):
        if not isinstance(document.get(key, ""), str):
            raise ProfileError(f"profile {path.name}: {key} must be a string")
    return document


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = {**base, **over}
    for key in _MERGED:
        below, above = base.get(key), over.get(key)
        if isinstance(below, dict) and isinstance(above, dict):
            both[key] = {**cast("dict[str, Any]", below), **cast("dict[str, Any]", above)}
    return both
