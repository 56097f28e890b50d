"""Plays Gymnasium environments with the service's policy: `rollout`, and `play_vector` for vectorised environments."""

from service.rollout import *  # noqa: F403 - `__all__` lists the names
from service.rollout import __all__ as __all__
