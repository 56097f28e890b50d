"""Gymnasium environments as text: `describe`, and what a description of your own has to offer."""

from service.environments import *  # noqa: F403 - `__all__` says what
from service.environments import __all__ as __all__
