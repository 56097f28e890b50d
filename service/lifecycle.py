"""The lifecycle of the service: whether it starts, is ready, or shuts down. The one place that knows.

An engine is loaded, serves, and may die and be loaded again. Independently, a signal starts the shutdown:

    serving -> leaving    unready for load balancers, still answers calls (the drain delay)
            -> draining   refuses new calls, in-flight acts continue
            -> aborting   the drain timeout was reached: in-flight acts are aborted
"""

from collections.abc import Callable
from enum import IntEnum, auto
from typing import Literal

UnreadyReason = Literal["loading", "engine_unavailable", "store_unavailable", "draining"]


class Phase(IntEnum):
    """How far the shutdown is. It never goes back."""

    SERVING = auto()
    LEAVING = auto()
    DRAINING = auto()
    ABORTING = auto()


class Lifecycle:
    """Set by the supervisor (the engine) and by the server (the shutdown), read by everything else."""

    def __init__(self) -> None:
        self.phase = Phase.SERVING
        self.is_loading_engine = False
        """A thread is loading an engine now. Nothing can interrupt it but the end of the process."""
        self._is_engine_healthy: Callable[[], bool] | None = None

    def engine_serves(self, is_healthy: Callable[[], bool]) -> None:
        """From now on acts are decided by an engine, as long as `is_healthy()`."""
        self._is_engine_healthy = is_healthy

    def enter(self, phase: Phase) -> None:
        self.phase = max(self.phase, phase)

    @property
    def is_draining(self) -> bool:
        """Whether new calls are refused."""
        return self.phase >= Phase.DRAINING

    @property
    def is_aborting(self) -> bool:
        return self.phase >= Phase.ABORTING

    @property
    def has_served(self) -> bool:
        """Whether an engine was ever ready."""
        return self._is_engine_healthy is not None

    @property
    def unready_reason(self) -> UnreadyReason | None:
        """Why an act would not be served now; None if it would."""
        if self.is_draining:
            return "draining"
        if self._is_engine_healthy is None:
            return "loading"
        return None if self._is_engine_healthy() else "engine_unavailable"

    @property
    def routing_reason(self) -> UnreadyReason | None:
        """Why a load balancer should choose another replica, the store aside; None if it should not."""
        return "draining" if self.phase >= Phase.LEAVING else self.unready_reason
