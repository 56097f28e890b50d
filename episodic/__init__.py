"""Python client of Episodic.

    from episodic import Client

    with Client("http://127.0.0.1:8000") as client:
        episode = client.episode(profile="frozen-lake")
        print(episode.act("0: S F\\n1: H G\\nrow 0, column 0").action)

This package re-exports `service.client`. `episodic.environments` re-exports `service.environments`, and
`episodic.rollout` re-exports `service.rollout`.
"""

from service.client import *  # noqa: F403 - `__all__` lists the names
from service.client import __all__ as __all__
