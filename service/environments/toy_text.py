"""Text descriptions of CliffWalking, Taxi and Blackjack."""

from typing import Any

from gymnasium.core import Env

from service.environments.base import JsonObject, discrete


class CliffWalkingText:
    """CliffWalking in text. An observation is the position on the 4x12 grid."""

    ACTIONS = ("up", "right", "down", "left")

    instructions: str = (
        "Walk from row 3, column 0 to row 3, column 11 in the fewest steps. "
        "Columns 1 to 10 of row 3 are a cliff. Actions: up, right, down, left."
    )
    action_space: JsonObject = discrete(ACTIONS)

    def __init__(self, env: Env[Any, Any]) -> None:
        del env  # the grid is always the same

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        return self.position(int(observation))

    def action(self, action: Any) -> Any:
        return self.ACTIONS.index(action)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool:
        """Whether the goal was reached. Nothing else terminates an episode."""
        return terminated

    @staticmethod
    def position(state: int) -> str:
        return f"row {state // 12}, column {state % 12}"


class TaxiText:
    """Taxi in text. An observation is the taxi's position, the passenger's place and the destination."""

    ACTIONS = ("south", "north", "east", "west", "pickup", "dropoff")
    PLACES = ("red", "green", "yellow", "blue", "taxi")

    instructions: str = (
        "Drive the taxi to the passenger, pickup, drive to the destination, dropoff. Red is row 0, column 0, "
        "green is row 0, column 4, yellow is row 4, column 0, blue is row 4, column 3. "
        "Actions: south, north, east, west, pickup, dropoff."
    )
    action_space: JsonObject = discrete(ACTIONS)

    def __init__(self, env: Env[Any, Any]) -> None:
        del env  # the streets are always the same

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        return self.situation(int(observation))

    def action(self, action: Any) -> Any:
        return self.ACTIONS.index(action)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool:
        """Whether the passenger was delivered. Nothing else terminates an episode."""
        return terminated

    @classmethod
    def situation(cls, state: int) -> str:
        """The text of a state. Taxi numbers states as ((row * 5 + column) * 5 + passenger) * 4 + destination."""
        rest, destination = divmod(state, 4)
        rest, passenger = divmod(rest, 5)
        row, column = divmod(rest, 5)
        return f"row {row}, column {column}, passenger {cls.PLACES[passenger]}, destination {cls.PLACES[destination]}"


class BlackjackText:
    """Blackjack in text.

    An observation is the player's sum, the dealer's open card (an ace is 1) and whether the player has a usable ace.
    """

    ACTIONS = ("stick", "hit")

    instructions: str = "Blackjack: come closer to 21 than the dealer, not over it. Actions: stick, hit."
    action_space: JsonObject = discrete(ACTIONS)

    def __init__(self, env: Env[Any, Any]) -> None:
        del env  # the observation contains everything that the text needs

    def observation(self, observation: Any, info: dict[str, Any]) -> str:
        player, dealer, ace = (int(part) for part in observation)
        return self.hand(player, dealer, bool(ace))

    def action(self, action: Any) -> Any:
        return self.ACTIONS.index(action)

    def success(self, reward: float, terminated: bool, truncated: bool, episode_return: float) -> bool:
        """Whether the hand was won."""
        return reward > 0

    @staticmethod
    def hand(player: int, dealer: int, ace: bool) -> str:
        return f"sum {player}, dealer {dealer}, usable ace {'yes' if ace else 'no'}"
