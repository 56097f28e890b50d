"""Finds the version of an adapter that a name stands for."""

from service.settings import policy_name
from service.trajectory import Catalog, StoredVersion

MIN_DIGEST = 8
"""Minimum number of characters of a digest that name a version."""
_DIGEST_LENGTH = 64


class PolicyUnknown(Exception):
    """There is no such policy. The message says what to do."""


def resolve(catalog: Catalog, name: str, pin: str | None, listing: str) -> StoredVersion:
    """Returns the version that acts in an episode.

    name: an alias, or `name@digest`.
    pin: what identifies the version of the episode; see `EpisodeConfig.policy_pin`. None for the current version.
    listing: the names of the policies, for the error message.

    An episode that an older release opened has only the version of the weights as its pin. If they are not stored, the
    alias decides, as in that release. Raises PolicyUnknown.
    """
    alias, _, _ = name.partition("@")
    known = [version for version in catalog.versions if version.name == alias]
    if pinned := [version for version in known if pin in (version.digest, version.version)]:
        return pinned[0]
    if pin is not None and len(pin) == _DIGEST_LENGTH:
        raise PolicyUnknown(f"the version {alias}@{pin[:12]} is not stored any more: load the same adapter again")
    found = _named(catalog, known, name)
    if len(found) == 1:
        return found[0]
    shown = policy_name(name)[:200]
    if found:
        raise PolicyUnknown(f"{shown!r} names several versions; give more characters of the digest")
    raise PolicyUnknown(f"there is no policy {shown!r}; the policies are {listing}, and GET /policy lists the versions")


def _named(catalog: Catalog, known: list[StoredVersion], name: str) -> list[StoredVersion]:
    alias, at, prefix = name.partition("@")
    if not at:
        return [version for version in known if version.digest == catalog.aliases.get(alias)]
    return [version for version in known if len(prefix) >= MIN_DIGEST and version.has_reference(name)]
