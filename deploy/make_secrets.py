"""Owns the secrets of the compose stack: made once, into a folder that nobody else can enter. Runs on the bare
interpreter.

A container has its secrets as files with the mode that they have here, whoever it runs as; so they are readable by all,
and the folder keeps others on this machine away from them.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(folder: Path) -> None:
    """Adds what is missing; what is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    password = keep(folder / "postgres_password", secrets.token_hex(32))
    keep(folder / "episodic_store", f"postgresql+asyncpg://episodic:{password}@db/episodic")
    keep(folder / "episodic_admin_key", f"ek_{secrets.token_hex(8)}_{secrets.token_hex(32)}")
    keep(folder / "grafana_password", secrets.token_urlsafe(24))


def keep(path: Path, value: str) -> str:
    """The file's text, which is `value` if there was no file."""
    if not path.exists():
        path.write_text(value + "\n", encoding="utf-8")
        path.chmod(0o444)
        print(f"made {path}")
    return path.read_text(encoding="utf-8").strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "secrets")
