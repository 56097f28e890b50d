"""Metrics for what happens in every act: a change costs a tenth of what prometheus_client's own take for it.

They are plain numbers without a lock, so only the thread of the event loop may change them. prometheus_client collects
them when /metrics is read.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector


class FastCounter(Collector):
    """A counter. The series of `expected` label values exist from the start."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str], expected: Sequence[str] = ()) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._values: dict[tuple[str, ...], float] = dict.fromkeys(((value,) for value in expected), 0.0)
        REGISTRY.register(self)

    def inc(self, *labels: str, amount: float = 1.0) -> None:
        """Adds to the series with these label values."""
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for labels, value in self._values.items():
            family.add_metric(labels, value)
        yield family


class FastGauge(Collector):
    """A gauge. Set `value`, or add to it."""

    def __init__(self, name: str, documentation: str) -> None:
        self._name, self._documentation = name, documentation
        self.value = 0
        REGISTRY.register(self)

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(self._name, self._documentation, value=self.value)


class FastHistogram(Collector):
    """A histogram with one label, whose values are known. `buckets`: their upper bounds, in ascending order."""

    def __init__(
        self, name: str, documentation: str, label: str, values: Sequence[str], buckets: Sequence[float]
    ) -> None:
        self._name, self._documentation, self._label = name, documentation, label
        self._buckets = buckets
        self._counts = {value: [0] * (len(buckets) + 1) for value in values}
        self._sums = dict.fromkeys(values, 0.0)
        REGISTRY.register(self)

    def observe(self, label: str, value: float) -> None:
        """Counts a value in the series with this label value."""
        self._counts[label][bisect_left(self._buckets, value)] += 1
        self._sums[label] += value

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=[self._label])
        bounds = [*(str(float(bound)) for bound in self._buckets), "+Inf"]
        for label, counts in self._counts.items():
            family.add_metric([label], list(zip(bounds, accumulate(counts), strict=True)), self._sums[label])
        yield family
