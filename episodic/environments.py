"""Describes Gymnasium environments as text: `describe`, and `TextDescription`, the protocol of such a description."""

from service.environments import *  # noqa: F403 - `__all__` lists the names
from service.environments import __all__ as __all__
