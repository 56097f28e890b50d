"""Tracks the lifecycle of the service: whether it is loading an engine, is ready, or is shutting down.

An engine is loaded, serves, and may die and be loaded again. Independently of this, a signal starts the shutdown:

    serving -> leaving    drain delay: not ready for load balancers, but calls are still served
            -> draining   new acts, episodes and forks are refused, in-flight acts continue
            -> aborting   drain timeout reached: in-flight acts are aborted
"""

from collections.abc import Callable
from enum import IntEnum, auto
from typing import Literal

UnreadyReason = Literal["loading", "engine_unavailable", "store_unavailable", "draining"]


class Phase(IntEnum):
    """The phase of the shutdown. It never goes back."""

    SERVING = auto()
    LEAVING = auto()
    DRAINING = auto()
    ABORTING = auto()


class Lifecycle:
    """The current state. The supervisor sets the state of the engine, and the server sets the phase of the shutdown."""

    def __init__(self) -> None:
        self.phase = Phase.SERVING
        self.num_calls = 0
        """Number of requests so far, apart from health checks and metrics."""
        self.is_loading_engine = False
        """Whether a thread is loading an engine now. Only the end of the process can interrupt it."""
        self._is_engine_healthy: Callable[[], bool] | None = None

    def engine_serves(self, is_healthy: Callable[[], bool]) -> None:
        """Reports that an engine was loaded. It can serve acts as long as `is_healthy()` returns true."""
        self._is_engine_healthy = is_healthy

    def enter(self, phase: Phase) -> None:
        """Moves the shutdown on to this phase. Does nothing if it is already in a later one."""
        self.phase = max(self.phase, phase)

    @property
    def is_leaving(self) -> bool:
        """Whether load balancers should choose other replicas."""
        return self.phase >= Phase.LEAVING

    @property
    def is_draining(self) -> bool:
        """Whether new acts, episodes and forks are refused."""
        return self.phase >= Phase.DRAINING

    @property
    def is_aborting(self) -> bool:
        return self.phase >= Phase.ABORTING

    @property
    def has_served(self) -> bool:
        """Whether an engine has ever been ready."""
        return self._is_engine_healthy is not None

    @property
    def unready_reason(self) -> UnreadyReason | None:
        """Why acts are not served now; None if they are. The store is not checked."""
        if self.is_draining:
            return "draining"
        if self._is_engine_healthy is None:
            return "loading"
        return None if self._is_engine_healthy() else "engine_unavailable"

    @property
    def routing_reason(self) -> UnreadyReason | None:
        """Why a load balancer should not choose this replica; None if it may. The store is not checked."""
        return "draining" if self.is_leaving else self.unready_reason
