"""Profiles: presets for POST /episode, read from packaged TOML files and from a folder of the operator."""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from service.errors import Unprocessable
from service.validation import strict_json

PACKAGED = Path(__file__).parents[1] / "packaged" / "profiles"
_MERGED = ("sampling", "context", "reasoning", "metadata")
"""Fields that are merged key by key. Every other field of a request or a profile replaces the inherited one."""


class ProfileError(ValueError):
    """A profile is invalid. The message names the profile and says why."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A preset. `fields` are fields of POST /episode, including those of the profiles that it extends."""

    name: str
    description: str
    fields: Mapping[str, Any]


class Profiles:
    """The profiles of the packaged folder and of `folder`.

    A file in `folder` replaces a packaged file with the same name. Files whose names begin with _ are ignored.
    """

    def __init__(self, fields: type[BaseModel], folder: Path | None = None) -> None:
        """`fields`: the Pydantic model that validates the fields of a profile. Raises ProfileError."""
        if folder is not None and not folder.is_dir():
            raise ProfileError(f"the folder {folder} does not exist")
        folders = [PACKAGED, folder] if folder else [PACKAGED]
        files = {path.stem: path for place in folders for path in sorted(place.glob("[!_]*.toml"))}
        self._fields = fields
        self._read = {name: _read(path) for name, path in files.items()}
        self._profiles = {name: self._resolved(name) for name in sorted(files)}

    def __iter__(self) -> Iterator[Profile]:
        return iter(self._profiles.values())

    def fill(self, document: dict[str, Any]) -> dict[str, Any]:
        """Adds the fields of the profile that a body of POST /episode names. Fields of the body take precedence.

        Raises Unprocessable if there is no such profile.
        """
        name = document.get("profile")
        if name is None:
            return document
        if not isinstance(name, str) or name not in self._profiles:
            known = ", ".join(sorted(self._profiles))
            raise Unprocessable(f"there is no profile {str(name)[:128]!r}. The profiles are {known}", "profile")
        return _merged(self._profiles[name].fields, document)

    def _resolved(self, name: str) -> Profile:
        chain: list[str] = []
        base: str | None = name
        while base is not None:
            if base in chain:
                raise ProfileError(f"profile {name!r} extends itself: {' -> '.join([*chain, base])}")
            if base not in self._read:
                raise ProfileError(f"profile {chain[-1]!r} extends {base!r}, which does not exist")
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
            as_json = strict_json.load(strict_json.dump(fields))
        except ValueError as error:
            raise ProfileError(f"profile {name!r}: {error}") from error
        return Profile(name, self._read[name].get("description", ""), as_json)


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
