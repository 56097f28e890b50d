"""The soak report: growth is reported with its rate per hour; noise, peaks and the warm-up are not reported."""

import math
import random
from typing import Any

from bench.soak_report import FIGURES, Sample, bytes_each, slope, trends, verdict

HOUR_S = 3600.0


def sampled(**of: Any) -> list[Sample]:
    """Half an hour of samples. `of` gives fields as functions of the time in seconds; the other fields are constant."""
    constant = dict.fromkeys(Sample.__dataclass_fields__, 100)
    at = [5.0 * number for number in range(361)]
    return [Sample(**{**constant, "at_s": at_s, **{name: value(at_s) for name, value in of.items()}}) for at_s in at]


def growing(samples: list[Sample]) -> set[str]:
    return {trend.figure.name for trend in trends(samples, warm_up_s=600) if trend.grows}


def test_a_slope_is_found_through_noise_and_peaks() -> None:
    generator = random.Random(1)
    points = [(float(x), 2.0 * x + generator.gauss(0, 5)) for x in range(0, 1800, 5)]
    points[::10] = [(x, 10_000.0) for x, _ in points[::10]]
    assert abs(slope(points) - 2.0) < 0.05
    assert slope(points[:1]) == 0.0


def test_a_service_at_rest_does_not_grow() -> None:
    generator = random.Random(1)
    samples = sampled(server_mb=lambda _: 900 + generator.gauss(0, 3), num_fds=lambda _: 80 + generator.randrange(20))
    assert growing(samples) == set()
    assert verdict(trends(samples, 600), 1200, failures=0) == "Nothing grows. All calls succeeded."


def test_a_leak_of_each_figure_is_told_by_its_name() -> None:
    for figure in (figure for figure in FIGURES if math.isfinite(figure.at_most_an_hour)):
        samples = sampled(**{figure.name: lambda at_s, rate=figure.at_most_an_hour * 2: 50 + rate * at_s / HOUR_S})
        assert growing(samples) == {figure.name}
        assert figure.title in verdict(trends(samples, 600), 1200, failures=0)


def test_what_fills_up_in_the_warm_up_is_no_growth() -> None:
    assert growing(sampled(server_mb=lambda at_s: min(at_s, 590.0))) == set()


def test_calls_that_failed_are_told() -> None:
    assert "3 calls failed" in verdict(trends(sampled(), 600), 1200, failures=3)


def test_a_few_minutes_do_not_tell_growth() -> None:
    samples = sampled(server_mb=lambda at_s: at_s)
    assert "grows" not in verdict(trends(samples, 600), 120, failures=0).lower()
    assert "2 minutes" in verdict(trends(samples, 600), 120, failures=0)


def test_what_a_step_and_a_tombstone_take_is_told_apart() -> None:
    def steps(at_s: float) -> float:
        return 2000 + 300 * math.sin(at_s)

    def free_mb(at_s: float) -> float:
        return 1 + math.cos(at_s / 100)

    rows = {"steps": steps, "tombstones": lambda at_s: 10 * at_s, "free_mb": free_mb}
    samples = sampled(**rows, store_mb=lambda at_s: free_mb(at_s) + 0.5 + (800 * steps(at_s) + 6000 * at_s) / 1e6)
    assert [round(each) for each in bytes_each(samples)] == [800, 600]
