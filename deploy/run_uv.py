"""Runs uv with the package indexes that pip is configured with, since uv does not read pip's configuration.

Uses the standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# pip's options, and uv's variables for them. uv separates several indexes by spaces, several folders by commas.
_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "cert": ("SSL_CERT_FILE", " "),
}


def uv(python: Path, *arguments: str, quiet: bool = False, find_links: bool = True) -> int:
    """Runs the uv that is installed next to this interpreter. Returns its exit status.

    `quiet` hides its error messages. Without `find_links`, it ignores the package folders that pip is configured with.
    """
    command = [str(python.with_name("uv")), *arguments]
    stderr = subprocess.DEVNULL if quiet else None
    settings = {**environment(python), **os.environ}
    if not find_links:
        settings.pop("UV_FIND_LINKS", None)
    return subprocess.run(command, check=False, env=settings, stderr=stderr).returncode  # noqa: S603


def environment(python: Path) -> dict[str, str]:
    """Returns uv's environment variables for pip's configuration, which comes from files and the environment."""
    command = [str(python), "-m", "pip", "config", "list"]
    listing = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - without pip there is no configuration
    words: dict[str, list[str]] = {}
    for line in listing.stdout.splitlines():
        name, _, value = line.partition("=")
        found = value.strip("'\"").replace("\\n", " ").split()
        words.setdefault(name.rpartition(".")[2], []).extend(found)
    found = {
        variable: separator.join(dict.fromkeys(words[option]))
        for option, (variable, separator) in _VARIABLES.items()
        if option in words
    }
    # Like pip, uv then looks for a locked version in every index; the hashes say which file is meant.
    return {**found, "UV_INDEX_STRATEGY": "unsafe-best-match"} if "UV_INDEX" in found else found
