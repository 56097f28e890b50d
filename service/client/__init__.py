"""A typed client of the service, blocking and for asyncio. Its retries never take a step twice.

    with Client("http://127.0.0.1:8000") as client:
        observation, _ = env.reset(seed=7)
        episode = client.episode(instructions="...", action_space={"type": "discrete", "actions": ["left", "right"]})
        act = episode.act(describe(observation))
        while not act.done:
            observation, reward, terminated, truncated, _ = env.step(index[act.action])
            act = episode.act(describe(observation), reward=reward, terminated=terminated, truncated=truncated)

`AsyncClient` has the same methods, to be awaited. `service.client.errors` shows the tree of errors.
"""

from service.client.asynchronous import AsyncClient, AsyncEpisode
from service.client.blocking import Client, Episode
from service.client.calls import OMITTED, ActFields, EpisodeFields, Filters, Observation, Omitted
from service.client.errors import (
    ApiError,
    ConnectionFailed,
    ContextOverflow,
    DeadlineExceeded,
    EpisodeBusy,
    EpisodeDeleted,
    EpisodeEnded,
    EpisodeNotFound,
    EpisodicError,
    IdempotencyMismatch,
    InvalidResponse,
    StepConflict,
    Unavailable,
)
from service.client.evaluation import Comparison, Evaluation, EvaluationGroup
from service.client.models import (
    Act,
    EpisodePage,
    EpisodeResource,
    Feedback,
    Parent,
    ParseFailure,
    Policy,
    PolicyVersion,
    Profile,
    Timing,
    TrajectoryFormat,
    Usage,
)
from service.client.retries import Retry
from service.client.state import DEFAULT_URL, BatchItem
from service.client.streams import Delta, Event
from service.filters import EpisodeFilter, EpisodeOrder, EpisodeQuery, EvaluationQuery

__all__ = [
    "DEFAULT_URL",
    "OMITTED",
    "Act",
    "ActFields",
    "ApiError",
    "AsyncClient",
    "AsyncEpisode",
    "BatchItem",
    "Client",
    "Comparison",
    "ConnectionFailed",
    "ContextOverflow",
    "DeadlineExceeded",
    "Delta",
    "Episode",
    "EpisodeBusy",
    "EpisodeDeleted",
    "EpisodeEnded",
    "EpisodeFields",
    "EpisodeFilter",
    "EpisodeNotFound",
    "EpisodeOrder",
    "EpisodePage",
    "EpisodeQuery",
    "EpisodeResource",
    "EpisodicError",
    "Evaluation",
    "EvaluationGroup",
    "EvaluationQuery",
    "Event",
    "Feedback",
    "Filters",
    "IdempotencyMismatch",
    "InvalidResponse",
    "Observation",
    "Omitted",
    "Parent",
    "ParseFailure",
    "Policy",
    "PolicyVersion",
    "Profile",
    "Retry",
    "StepConflict",
    "Timing",
    "TrajectoryFormat",
    "Unavailable",
    "Usage",
]
