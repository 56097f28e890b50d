"""The token log: a window is what the policy saw. It keeps step 0, and drops whole steps, many of them at once."""

from array import array
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.token_log import TokenLog, closed_span
from service.trajectory import Span

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def span(token_ids: list[int]) -> Span:
    return Span(array("i", token_ids), bytes(len(token_ids)), array("f", [0.0] * len(token_ids)))


def log_of(lengths: list[int]) -> TokenLog:
    """Returns a log in which step k has `lengths[k]` tokens, all equal to k. So a window shows its steps."""
    return TokenLog(span([step] * length) for step, length in enumerate(lengths))


def steps_in(window: list[int]) -> list[int]:
    return sorted(set(window))


def test_an_empty_log_has_an_empty_window():
    log = TokenLog()
    assert (len(log), log.num_steps, log.window(log.start), log.window_len(log.start)) == (0, 0, [], 0)
    assert log.fit(10, 10) == log.start
    assert log.fit(11, 10) is None


@given(LENGTHS)
def test_the_first_window_is_the_whole_log(lengths: list[int]):
    log = log_of(lengths)
    assert log.window(1) == [step for step, length in enumerate(lengths) for _ in range(length)]
    assert len(log) == sum(lengths)


@given(LENGTHS, st.data())
def test_a_window_keeps_step_0_and_whole_steps_from_its_start_on(lengths: list[int], data: st.DataObject):
    log = log_of(lengths)
    start = data.draw(st.integers(1, len(lengths)))
    window = log.window(start)
    assert window == [step for step, length in enumerate(lengths) for _ in range(length) if step == 0 or step >= start]
    assert log.window_len(start) == len(window)


@given(LENGTHS, st.integers(0, 60), st.integers(1, 400))
def test_a_fitting_window_leaves_room_for_the_turn(lengths: list[int], turn_len: int, limit: int):
    log = log_of(lengths)
    start = log.fit(turn_len, limit)
    if lengths[0] + turn_len > limit:
        assert start is None
        return
    assert start is not None
    window = log.window(start)
    assert len(window) + turn_len <= limit
    assert window[: lengths[0]] == [0] * lengths[0]
    assert start >= log.start


@given(LENGTHS, st.integers(0, 60))
def test_nothing_is_dropped_while_all_fits(lengths: list[int], turn_len: int):
    log = log_of(lengths)
    assert log.fit(turn_len, len(log) + turn_len) == log.start


@given(LENGTHS, st.integers(0, 60), st.integers(1, 400))
def test_a_slide_frees_half_of_the_room_behind_step_0_and_no_step_more(lengths: list[int], turn_len: int, limit: int):
    log = log_of(lengths)
    start = log.fit(turn_len, limit)
    if start is None or start == log.start:
        return
    room = limit - turn_len - lengths[0]
    assert log.window_len(start) - lengths[0] <= room // 2
    assert log.window_len(start - 1) - lengths[0] > room // 2


@given(st.integers(3, 12), st.integers(60, 300))
def test_after_a_slide_half_of_the_room_is_used_before_the_next(length: int, limit: int):
    log, slid_at = log_of([length]), []
    for step in range(1, 250):
        start = log.fit(length, limit)
        assert start is not None
        if start != log.start:
            slid_at.append(step)
        log.start = start
        log.append_span(span([step] * length))
    room_in_steps = (limit - 2 * length) // length
    assert len(slid_at) > 1
    assert all(later - earlier >= room_in_steps // 2 for earlier, later in pairwise(slid_at))


@given(LENGTHS, st.integers(0, 30), st.integers(60, 300), st.data())
def test_a_restored_log_decides_as_the_one_that_lived_on(
    lengths: list[int], turn_len: int, limit: int, data: st.DataObject
):
    broken_at = data.draw(st.integers(1, len(lengths)))
    uninterrupted = TokenLog()
    for step, length in enumerate(lengths):
        if step == broken_at:
            rows = [span([index] * size) for index, size in enumerate(lengths[:step])]
            restored = TokenLog(rows, start=uninterrupted.start)
            assert restored.window(restored.start) == uninterrupted.window(uninterrupted.start)
            assert restored.fit(turn_len, limit) == uninterrupted.fit(turn_len, limit)
        start = uninterrupted.fit(length, limit)
        uninterrupted.append_span(span([step] * length))
        uninterrupted.start = start or uninterrupted.start


@pytest.mark.parametrize(("drawn", "closed"), [([7, 8], [7, 8, 9]), ([7, 9], [7, 9]), ([], [9])])
def test_a_closed_span_ends_with_the_terminator_once(drawn: list[int], closed: list[int]):
    completion = Span(array("i", drawn), b"\x01" * len(drawn), array("f", [-0.5] * len(drawn)))
    result = closed_span([1, 2], completion, terminator=9)
    added = len(closed) - len(drawn)
    assert result.token_ids.tolist() == [1, 2, *closed]
    assert list(result.loss_mask) == [0, 0] + [1] * len(drawn) + [0] * added
    assert result.logprobs.tolist() == [0.0, 0.0] + [-0.5] * len(drawn) + [0.0] * added
