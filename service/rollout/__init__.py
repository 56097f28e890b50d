"""Plays a Gymnasium environment with the service's policy and with a random policy, and reports the results of both."""

from service.rollout.environment import EnvironmentFactory, RewardNotFinite, UnusableEnvironment
from service.rollout.play import rollout
from service.rollout.report import Failure, Report, Summary
from service.rollout.vector import play_vector

__all__ = [
    "EnvironmentFactory",
    "Failure",
    "Report",
    "RewardNotFinite",
    "Summary",
    "UnusableEnvironment",
    "play_vector",
    "rollout",
]
