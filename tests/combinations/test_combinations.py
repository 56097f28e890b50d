"""A short run of random sequences of calls and faults; `make fuzz` is a long one.

The outcomes that it must reach do not depend on the speed of the machine. `episode_busy` does: it needs two acts of one
episode at the same moment.
"""

from service.engine.tokenizer import HFTokenizer
from tests.combinations.runs import play


def test_every_answer_and_all_that_is_stored_agree_with_the_model(tokenizer: HFTokenizer):
    counts = play(200, seed=1, tokenizer=tokenizer)
    for outcome in ("act: act", "stream: act", "record: act", "item: act", "end: close"):
        assert counts[outcome], f"no call came to {outcome}"
    for outcome in (
        "replay",
        "close",
        "step_conflict",
        "idempotency_mismatch",
        "episode_ended",
        "episode_deleted",
    ):
        assert any(name.endswith(outcome) for name in counts), f"no call came to {outcome}"
