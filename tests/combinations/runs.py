"""Plays random sequences of calls and faults in several processes.

Prints how many calls of each kind came to what, and each violation with the calls that led to it. A violation ends its
chunk of sequences only.
"""

import argparse
import multiprocessing
import os
import sys
import traceback
from collections import Counter
from functools import partial
from typing import NoReturn

import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import run_state_machine_as_test

from service.engine.tokenizer import Tokenizer
from tests.combinations.machine import Host, machine
from tests.combinations.world import packaged_tokenizer

_CHUNK = 200
"""Number of sequences that one process plays at once. Hypothesis keeps all of them in memory."""


def play(num_sequences: int, seed: int, tokenizer: Tokenizer) -> Counter[str]:
    """Plays sequences of up to 25 rules on a SQLite file. Returns how often each call came to what.

    Raises Violation at the first contradiction to the model.
    """
    host = Host(lambda folder: f"sqlite:///{folder}/episodic.db", tokenizer)
    options = settings(
        max_examples=num_sequences,
        stateful_step_count=25,
        phases=[Phase.generate],  # without shrinking: the calls of the sequence are printed
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seeded(seed)(machine(host)), settings=options)
        return host.counts
    finally:
        host.close()


def _drop(*_: object) -> NoReturn:
    raise structlog.DropEvent


def play_chunk(seed: int, number: int) -> tuple[Counter[str], str | None]:
    """Returns the counts, or the first violation."""
    structlog.configure(processors=[_drop])
    try:
        return play(_CHUNK, seed * 1_000_000 + number, packaged_tokenizer()), None
    except Exception:  # noqa: BLE001 - a violation, or a failure of the service that the model does not catch
        return Counter(), traceback.format_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    for name in [name for name in os.environ if name.startswith("EPISODIC_")]:
        del os.environ[name]
    counts: Counter[str] = Counter()
    num_violations = 0
    # Not ProcessPoolExecutor: with max_tasks_per_child it can wait forever (Python 3.11, python/cpython#115634).
    with multiprocessing.get_context("spawn").Pool(given.processes, maxtasksperchild=5) as processes:
        chunks = range(-(-given.sequences // _CHUNK))
        for number, (more, violation) in enumerate(processes.imap(partial(play_chunk, given.seed), chunks), 1):
            counts += more
            if violation:
                num_violations += 1
                sys.stderr.write(f"chunk {number - 1}: {violation}\n")
            if number % 10 == 0:
                sys.stderr.write(f"{counts['sequences']:,} sequences\n")
    sequences = counts.pop("sequences")
    for name, count in sorted(counts.items()):
        sys.stdout.write(f"{count:9,}  {name}\n")
    sys.stdout.write(f"{sequences} sequences, seed {given.seed}: {num_violations or 'no'} violations\n")
    sys.exit(num_violations > 0)
