"""Runs a campaign: rounds with one kind of fault on one store.

A round creates episodes, plays them, injects one fault at a moment that depends on the seed, waits until every call is
answered, and audits the episodes. The campaign ends with an audit of all episodes.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tests.faults.auditor import Auditor
from tests.faults.checker import Finding
from tests.faults.ledger import Ledger, calling
from tests.faults.player import BATCH_SIZE, NUM_MOVES, Player
from tests.faults.stand import STRIKES, Stand, Strike

_ROUND_LIMIT_S = 600.0
_IN_BATCHES = 0.375
"""Fraction of the episodes that act in batches."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a campaign. The same plan leads to the same random choices."""

    kind: str
    store: str
    seed: int
    num_rounds: int
    num_episodes: int
    first_round: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a campaign."""

    plan: Plan
    num_rounds: int
    num_faults: int
    num_acts: int
    num_retried: int
    num_replayed: int
    findings: list[Finding]

    @property
    def num_losses(self) -> int:
        return sum(finding.kind in ("loss", "gap") for finding in self.findings)

    @property
    def num_doubles(self) -> int:
        return sum(finding.kind == "double" for finding in self.findings)

    @property
    def num_others(self) -> int:
        return len(self.findings) - self.num_losses - self.num_doubles

    def document(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("num_losses", "num_doubles", "num_others")}
        return {**asdict(self), **counts}


Log = Callable[[str], None]


def run(
    stand: Stand,
    plan: Plan,
    log: Log = lambda _: None,
    *,
    strikes: Mapping[str, Strike] = STRIKES,
    ledger: Ledger | None = None,
) -> Verdict:
    """Runs the campaign, and calls `log` with a line for each round.

    The `ledger` of earlier campaigns on the same store can be passed on: its episodes are then audited again.
    """
    return asyncio.run(_run(stand, plan, log, strikes[plan.kind], ledger or Ledger()))


async def _run(stand: Stand, plan: Plan, log: Log, strike: Strike, ledger: Ledger) -> Verdict:
    num_rounds, num_faults, num_logged = 0, 0, len(ledger.findings)
    for number in range(plan.first_round, plan.first_round + plan.num_rounds):
        num_rounds += 1
        try:
            async with asyncio.timeout(_ROUND_LIMIT_S):
                what = await _round(stand, plan, number, ledger, strike)
        except TimeoutError:
            ledger.findings.append(Finding("stuck", f"round {number}", f"calls unanswered after {_ROUND_LIMIT_S:g} s"))
            break
        num_faults += 1
        for finding in ledger.findings[num_logged:]:
            log(f"  {finding}")
        num_logged = len(ledger.findings)
        totals = f"{ledger.num_acts} acts, {len(ledger.findings)} findings"
        log(f"{plan.kind} on {plan.store}, round {number}: {what}; {totals}")
    else:
        await _audit_all(stand, plan, ledger)
    return Verdict(
        plan, num_rounds, num_faults, ledger.num_acts, ledger.num_retried, ledger.num_replayed, ledger.findings
    )


async def _round(stand: Stand, plan: Plan, number: int, ledger: Ledger, strike: Strike) -> str:
    def generator(what: str) -> random.Random:
        """A generator for one purpose, so that its numbers do not depend on the timing of the others."""
        return random.Random(f"{plan.seed}:{plan.kind}:{plan.store}:{number}:{what}")

    known = set(ledger.histories)
    async with calling(stand.urls, generator("ways"), ledger, stand.api_key) as client:
        async with asyncio.TaskGroup() as group:
            plays = _plays(lambda name: Player(client, generator(name), ledger), plan, number)
            players = [group.create_task(play) for play in plays]
            striking = group.create_task(_strike(stand, plan, generator("strike"), ledger, players, strike))
        fresh = [history for name, history in ledger.histories.items() if name not in known]
        await Auditor(client, generator("audit"), ledger).audit(fresh, go_on=True)
    return striking.result()


def _plays(player: Callable[[str], Player], plan: Plan, number: int) -> list[Coroutine[Any, Any, None]]:
    """Returns the plays of all episodes: some act together in batches, the others separately."""
    names = [f"{plan.kind}-{plan.store}-{plan.seed}-{number}-{place}" for place in range(plan.num_episodes)]
    num_batches = int(plan.num_episodes * _IN_BATCHES) // BATCH_SIZE
    batches = [names[place * BATCH_SIZE :][:BATCH_SIZE] for place in range(num_batches)]
    singles = names[num_batches * BATCH_SIZE :]
    return [player(batch[0]).play_batch(batch) for batch in batches] + [player(name).play(name) for name in singles]


async def _strike(
    stand: Stand,
    plan: Plan,
    generator: random.Random,
    ledger: Ledger,
    players: "list[asyncio.Task[None]]",
    strike: Strike,
) -> str:
    """Injects the fault after a random share of the round's acts, possibly while the episodes are still created."""
    moment = ledger.num_acts + int(generator.uniform(0.0, 0.8) * plan.num_episodes * NUM_MOVES)
    delay_s = generator.uniform(0.0, 0.03)
    while ledger.num_acts < moment and not all(player.done() for player in players):  # noqa: ASYNC110 - players change it
        await asyncio.sleep(0.002)
    await asyncio.sleep(delay_s)
    return await asyncio.to_thread(strike, stand, generator)


async def _audit_all(stand: Stand, plan: Plan, ledger: Ledger) -> None:
    generator = random.Random(f"{plan.seed}:{plan.kind}:{plan.store}")
    async with calling(stand.urls, generator, ledger, stand.api_key) as client:
        await Auditor(client, generator, ledger).audit(list(ledger.histories.values()))
