"""`make secrets`: creates the secrets of the compose stack, once. Uses the standard library only.

Compose mounts the secret files with the mode that they have on the host, and each container runs as another user. So
every user may read the files, and the mode of the folder keeps other users of this machine out.
"""

from __future__ import annotations

import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(folder: Path) -> None:
    """Creates the secret files that are missing in `folder`. Existing files stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    password = keep(folder / "postgres_password", secrets.token_hex(32))
    keep(folder / "episodic_store", f"postgresql+asyncpg://episodic:{password}@db/episodic")
    keep(folder / "episodic_admin_key", f"ek_{secrets.token_hex(8)}_{secrets.token_hex(32)}")
    keep(folder / "grafana_password", secrets.token_urlsafe(24))


def keep(path: Path, value: str) -> str:
    """Writes `value` to the file if it does not exist. Returns the text of the file."""
    if not path.exists():
        path.write_text(value + "\n", encoding="utf-8")
        path.chmod(0o444)
        print(f"created {path}")
    return path.read_text(encoding="utf-8").strip()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "secrets")
