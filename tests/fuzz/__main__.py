"""`python -m tests.fuzz`: feeds hostile inputs to every parser, and compares the grammars of random schemas with a
judge, from a seed. Stops at the first input that makes a parser fail."""

import argparse
import random
import sys
import warnings

from tests.fuzz.mutations import mutated
from tests.fuzz.schemas import campaign
from tests.fuzz.targets import TARGETS, prepare


def fuzz(num_inputs: int, seed: int) -> dict[str, int]:
    """Feeds each target its share of the inputs.

    Returns the number of rejected inputs by target. Raises AssertionError at the first failure.
    """
    prepare()
    rejected = dict.fromkeys(TARGETS, 0)
    for name, target in TARGETS.items():
        for number in range(-(-num_inputs // len(TARGETS))):
            generator = random.Random(f"{seed}/{name}/{number}")
            data = mutated(generator, target.corpus)
            try:
                target.run(data, generator)
            except target.allowed:
                rejected[name] += 1
            except BaseException as error:  # a panic in a Rust library is a BaseException
                raise AssertionError(f"{name}, seed {seed}, input {number}: {data!r}") from error
    return rejected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--schemas", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("error")
    rejected = fuzz(given.inputs, given.seed)
    num_inputs = len(TARGETS) * -(-given.inputs // len(TARGETS))
    shares = ", ".join(f"{name} {count}" for name, count in rejected.items())
    sys.stdout.write(f"{num_inputs} inputs, seed {given.seed}: none failed; rejected: {shares}\n")
    counts = campaign(given.schemas, given.seed)
    sys.stdout.write("\n".join([str(counts), *counts.violations, *counts.unreachable, ""]))
    sys.exit(bool(counts.violations or counts.unreachable))


if __name__ == "__main__":
    main()
