"""A short run of the fuzzer; `make fuzz` is a long one."""

from tests.fuzz.__main__ import fuzz
from tests.fuzz.schemas import campaign
from tests.fuzz.targets import TARGETS


def test_fuzzed_input_raises_only_service_errors():
    num_inputs = 5000
    rejected = fuzz(num_inputs, seed=1)
    for name, count in rejected.items():
        assert 0 < count < num_inputs / len(TARGETS), f"{name}: all inputs were rejected, or none"


def test_grammars_derive_exactly_the_valid_values():
    counts = campaign(60, seed=1)
    assert counts.accepted >= 30
    assert counts.refused.keys() >= {"no valid value"}
    assert min(counts.written, counts.valid) >= 200
    assert counts.violations == []
    assert counts.unreachable == []
