"""Plays a Gymnasium environment with the service's policy and with a random policy, and reports the results of both."""

from service.rollout.environment import EnvironmentFactory, RewardNotFinite, UnusableEnvironment
from service.rollout.play import EpisodeRefused, rollout
from service.rollout.report import Failure, Report, Summary
from service.rollout.run import Run
from service.rollout.vector import play_vector

__all__ = [
    "EnvironmentFactory",
    "EpisodeRefused",
    "Failure",
    "Report",
    "RewardNotFinite",
    "Run",
    "Summary",
    "UnusableEnvironment",
    "play_vector",
    "rollout",
]
