"""Playing Gymnasium environments with the service's policy: `rollout`, and `play_vector` for vectorised ones."""

from service.rollout import *  # noqa: F403 - `__all__` says what
from service.rollout import __all__ as __all__
