"""Random sequences of calls and faults, as a state machine of Hypothesis.

Hypothesis draws the rules and a seed for each. What a rule does follows from its seed, because the number of choices
depends on races that may end differently when Hypothesis repeats a sequence.
"""

import asyncio
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from service.engine.tokenizer import Tokenizer
from tests.combinations.model import DISCRETE, SPACES, TTL_S, Buckets, Episode, Kind, Request
from tests.combinations.player import Player
from tests.combinations.world import CountingLoop, Replica, World

_SEQUENCES_IN_A_WORLD = 200
_NUM_NAMES = 4

_TENANTS = ("free", "free", "free", "free", "tight", "tight", "slow")
_REWARDS = (None, None, 0.0, 1.0, 0.5, -2.0, 1.7e308)
_KEYS = (None, None, None, "k0", "k1", "k2")
_KINDS: tuple[Kind, ...] = ("act", "act", "act", "stream", "item", "record")
_ENDS = (
    {},
    {"terminated": True},
    {"truncated": True, "reward": 1.0},
    {"terminated": True, "success": True, "reward": -1.0},
    {"reward": 1.7e308},
)
_INVALID_SPACES = ({"type": "regex", "pattern": "("}, {"type": "discrete", "actions": ["a"]}, {"type": "none"})
_BAD_ITEMS = ((), (), (), ({},), ({"episode_id": 3},), ({"episode_id": "-", "observation": "x", "what": 1},))


class Host:
    """Runs worlds in an event loop of its own. After a failure the next sequence gets a new world."""

    def __init__(self, new_store: Callable[[Path], str], tokenizer: Tokenizer) -> None:
        self._new_store, self._tokenizer = new_store, tokenizer
        self._loop = CountingLoop()
        self._world: World | None = None
        self.counts: Counter[str] = Counter()

    def run(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)

    @property
    def world(self) -> World:
        if self._world and self._world.num_sequences >= _SEQUENCES_IN_A_WORLD:
            self.close_world()
        if self._world is None:
            self._folder = Path(tempfile.mkdtemp(prefix="episodic-combinations-"))
            self._world = World(self._new_store(self._folder), self._folder, self._tokenizer)
            self._world.buckets = Buckets()
            self._clock = self._world.clock.installed()
            self._clock.__enter__()
            self.run(self._world.start())
        return self._world

    def close_world(self) -> None:
        world, self._world = self._world, None
        if world is not None:
            self.run(world.stop())
            self._clock.__exit__(None, None, None)
            shutil.rmtree(self._folder)

    def abandon_world(self) -> None:
        """Leaves a world that is in an unknown state, together with its event loop."""
        self._world = None
        self._clock.__exit__(None, None, None)
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self.run(asyncio.sleep(0.1))
        self._loop = CountingLoop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        self.close_world()
        self._loop.close()


SEEDS = st.integers(0, 2**32 - 1)


class Sequences(RuleBasedStateMachine):
    """A sequence of calls and faults, each drawn from a seed. `machine` sets the host."""

    host: ClassVar[Host]

    def __init__(self) -> None:
        super().__init__()
        self.world = self.host.world
        self.player = Player(self.world, self.host.counts)
        self.failed = False
        self.host.counts["sequences"] += 1

    def run(self, work: Any) -> None:
        try:
            self.host.run(work)
        except BaseException as error:
            self.failed = True
            error.add_note("\n".join(["The calls, each with its replica and tenant:", *self.world.log]))
            raise

    def teardown(self) -> None:
        try:
            if not self.failed:
                self.run(self.player.finish())
        finally:
            if self.failed:
                self.host.abandon_world()

    @initialize(seed=SEEDS)
    def begin(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        for number in range(draw.random.randint(1, 3)):
            self.run(self.player.open(*draw.opening(number)))

    @rule(seed=SEEDS)
    def open(self, seed: int) -> None:
        self.run(self.player.open(*Draw(seed, self.player).opening()))

    @rule(seed=SEEDS)
    def act(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        if episode := draw.episode():
            self.send(draw, draw.request(episode))

    @rule(seed=SEEDS)
    def act_on(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        if episode := draw.episode(active=True):
            self.send(draw, draw.request(episode))

    act_on_and_on = act_on  # drawn twice as often as other rules

    @rule(seed=SEEDS)
    def retry(self, seed: int) -> None:
        """Sends an earlier request again: elsewhere, in another form, without its step, or with another body."""
        draw = Draw(seed, self.player)
        if self.player.sent:
            self.send(draw, draw.retry())

    retry_again = retry

    @rule(seed=SEEDS)
    def end(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        if (episode := draw.episode()) and draw.one_in(2):
            self.send(draw, Request("end", episode.tenant, episode.name, draw.random.choice(_ENDS)))

    def send(self, draw: "Draw", request: Request) -> None:
        replica = draw.replica()
        leaves_after = draw.random.choice((None,) * 12 + (1, 3, 10, 30)) if replica.gate is None else None
        self.run(self.player.send(replica, [request], leaves_after=leaves_after))

    @rule(seed=SEEDS)
    def batch(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        if episode := draw.episode():
            mine = [other for other in self.player.episodes.values() if other.tenant == episode.tenant]
            chosen = draw.random.sample(mine, draw.random.randint(1, min(len(mine), 4)))
            requests = [draw.request(other, "item") for other in chosen]
            if draw.one_in(8):
                self.run(self.player.send_twice(draw.replica(), requests))
            else:
                self.run(self.player.send(draw.replica(), requests, bad_items=draw.random.choice(_BAD_ITEMS)))

    @rule(seed=SEEDS)
    def fork(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        if episode := draw.episode():
            self.run(self.player.fork(draw.replica(), episode, *draw.forks(episode)))

    @rule(seed=SEEDS)
    def delete(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        if (episode := draw.episode()) and draw.one_in(4):
            self.run(self.player.delete(draw.replica(), episode))

    @rule(seed=SEEDS)
    def rate(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        if episode := draw.episode():
            body: dict[str, Any] = {"rating": draw.random.randint(0, 5)}
            body |= draw.random.choice(({}, {"rater": "ana"}, {"rater": "ben"}))
            body |= draw.random.choice(({}, {"step": draw.random.randint(0, episode.num_steps)}))
            self.run(self.player.rate(draw.replica(), episode, body))

    @rule(seed=SEEDS)
    def read(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        if episode := draw.episode():
            self.run(self.player.read(draw.replica(), episode, draw.random))

    @rule(seed=SEEDS)
    def close_gate(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        replica = draw.replica()
        if replica.gate is None and replica.may_load.is_set():
            replica.close_gate(draw.random.choice(("engine", "commits")))
            self.world.log.append(f"   replica {replica.number}: {replica.gate} wait")

    @rule()
    def open_gates(self) -> None:
        self.world.log.append("   gates open")
        self.run(self.player.release())

    @rule(seed=SEEDS)
    def leave(self, seed: int) -> None:
        if waiting := self.player.can_leave():
            self.run(self.player.leave(random.Random(seed).choice(waiting)))

    @rule(seed=SEEDS)
    def fail(self, seed: int) -> None:
        draw = Draw(seed, self.player)
        fault = draw.random.choice(("lost", "stored", "unknown", "nan", "engine", "restart"))
        if draw.one_in(2):
            self.run(self.player.fail(draw.replica(), fault))

    @rule()
    def recover(self) -> None:
        self.world.log.append("   faults end")
        self.run(self.player.recover())

    @rule()
    def tick(self) -> None:
        self.world.clock.advance(0.5)

    @rule(seed=SEEDS)
    def pass_time(self, seed: int) -> None:
        if Draw(seed, self.player).one_in(3):
            self.world.log.append("   much later")
            self.run(self.player.pass_time())


def machine(host: Host) -> type[Sequences]:
    """Returns the state machine whose sequences run in the host's worlds."""
    return type("Sequences", (Sequences,), {"host": host})


class Draw:
    """What one rule does, drawn from its seed."""

    def __init__(self, seed: int, player: Player) -> None:
        self.random, self.player = random.Random(seed), player

    def one_in(self, number: int) -> bool:
        return self.random.randrange(number) == 0

    def replica(self) -> Replica:
        return self.random.choice(self.player.world.replicas)

    def episode(self, *, active: bool = False) -> Episode | None:
        found = [episode for episode in self.player.episodes.values() if episode.is_active or not active]
        return self.random.choice(found) if found else None

    def opening(self, number: int | None = None) -> tuple[Replica, str, str, dict[str, Any]]:
        """Returns the arguments of `Player.open`: those of an earlier call, or of another episode."""
        choose = self.random.choice
        name = f"{self.player.prefix}-{self.random.randrange(_NUM_NAMES) if number is None else number}"
        tenant = choose(_TENANTS)
        known = self.player.episodes.get((tenant, name))
        if known and known.opened_with and self.one_in(2):
            return self.replica(), tenant, name, known.opened_with
        space = choose(list(SPACES))
        options = {
            "max_steps": choose((None, None, None, 1, 3)),
            "idle_ttl_s": choose((None, None, TTL_S)),
            "group": choose((None, "g")),
            "sampling": choose((None, {"seed": 7})),
            "reasoning": choose((None, None, {"max_tokens": 8, "history": "drop"})),
            "context": choose(
                (None,) * 6 + ({"max_tokens": 140, "overflow": "end"}, {"max_tokens": 140, "overflow": "error"})
            ),
        }
        body = {"instructions": f"space {space}", "action_space": SPACES[space], "tags": [self.player.prefix]}
        body |= {field: value for field, value in options.items() if value is not None}
        if self.one_in(12):
            body["action_space"] = choose(_INVALID_SPACES)
        return self.replica(), tenant, name, body

    def request(self, episode: Episode, kind: Kind | None = None) -> Request:
        """Returns an act that was not sent before."""
        choose = self.random.choice
        kind = kind or choose(_KINDS)
        seen = f"look {next(self.player.observations)}"
        body: dict[str, Any] = {
            "observation": choose((seen, seen, {"seen": seen}, [{"type": "text", "text": seen}], [seen, 1]))
        }
        if (reward := choose(_REWARDS)) is not None:
            body["reward"] = reward
        if self.one_in(6):
            body["info"] = {"n": self.random.randrange(3)}
        if episode.space == "discrete" and self.one_in(2):
            body["legal_actions"] = self.random.sample(DISCRETE, self.random.randint(1, len(DISCRETE)))
        fault = choose((None,) * 16 + ("form", "content", "action"))
        if kind == "record":
            body["action"] = 7 if fault == "action" else self.action(episode, body)
        elif fault == "action":
            fault = None
        if fault == "content":
            body["success"] = True
        elif fault == "form":
            body["reward"] = "much"
        elif kind != "record" and self.one_in(10):
            body |= choose(({"terminated": True}, {"truncated": True}, {"terminated": True, "success": False}))
        timeout_s = choose((None, None, None, 30.0, 0.05)) if kind != "record" else None
        key = choose(_KEYS) if kind != "item" else None
        return Request(kind, episode.tenant, episode.name, body, self.step(episode), key, timeout_s, fault)

    def step(self, episode: Episode) -> int | None:
        latest = episode.num_steps
        return self.random.choice((None, latest, latest, latest, latest, max(latest - 1, 0), 0, latest + 1, 99))

    def action(self, episode: Episode, body: dict[str, Any]) -> Any:
        number = next(self.player.world.numbers)
        match episode.space:
            case "discrete":
                return self.random.choice(body.get("legal_actions", DISCRETE))
            case "json":
                return {"n": number}
            case "tools":
                return {"name": "go", "arguments": {"n": number}}
            case "regex":
                return f"n{number}"
            case _:
                return f"text {number}"

    def retry(self) -> Request:
        choose = self.random.choice
        sent = choose(self.player.sent[-6:])
        episode = self.player.episodes.get((sent.tenant, sent.name))
        forms: tuple[Kind, ...] = ("act", "stream", "item")
        match choose(("none", "none", "form", "step", "key", "body", "timeout")):
            case "form" if sent.kind in forms:
                kind = choose(forms)
                return replace(sent, kind=kind, key=None if kind == "item" else sent.key)
            case "step" if sent.kind != "end" and episode:
                return replace(sent, step=self.step(episode))
            case "key" if sent.kind in ("act", "stream", "record"):
                return replace(sent, key=choose(_KEYS))
            case "body":
                return replace(sent, body={**sent.body, "info": {"changed": True}})
            case "timeout" if sent.kind in forms:
                return replace(sent, timeout_s=choose((None, 30.0, 0.05)))
            case _:
                return sent

    def forks(self, episode: Episode) -> tuple[dict[str, Any], list[str] | None]:
        """Returns the body of a fork, and the names of the new episodes, or None."""
        number, first = self.random.randint(1, 2), self.random.randrange(_NUM_NAMES)
        body: dict[str, Any] = {"n": number}
        if self.one_in(2):
            body["at_step"] = self.random.randint(0, episode.num_steps + 1)
        names = [f"{self.player.prefix}-{(first + place) % _NUM_NAMES}" for place in range(number)]
        return body, names if self.one_in(2) else None
