"""Raises the limit on open files, because each connection is one."""

import contextlib
import sys

NUM_FILES = 1 << 16
"""More than a server or a rollout needs. The usual limit, 1,024, is reached by a thousand concurrent episodes."""


def raise_limit() -> None:
    """Raises the soft limit of this process to `NUM_FILES`, or to the hard limit if that is lower."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_FILES if hard == resource.RLIM_INFINITY else min(NUM_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # for example, macOS has a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
