"""Improves a policy by its own episodes, round after round. Programs call `rounds.learn`, people `episodic learn`.

* `plan`: what can be set, and which seeds are played for what
* `state`: what has been done, in a file that survives a kill
* `playing`: rollouts, exports and comparisons, over HTTP
* `policies`: versions and the alias, over HTTP
* `training`: the training, as a process of its own
* `rounds`: the rounds and the final test
* `report`: the report and the learning curve

The loop uses the service only through its HTTP API, so the service goes on serving others.
"""


class LearningFailed(Exception):
    """The loop cannot start or go on. The message says why, and what to do."""
