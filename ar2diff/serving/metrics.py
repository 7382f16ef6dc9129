"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
OF_ENGINE = {  # counters, by the engine's name for them
    "forwards": "Forwards of the model.",
    "tokens": "Tokens that were decided.",
    "rows": "Answers that were finished.",
    "prompts": "Tokens of prompts.",
    "reused": "Tokens of prompts that were known from an earlier one.",
}
NOW = {"running": "Answers that are being written.", "waiting": "Answers that wait for a place."}


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ar2diff_requests", "Requests that were answered.", ["path", "status"],
            registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "ar2diff_request_seconds", "Seconds from a request to the end of its answer.",
            ["path"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "ar2diff_first_text_seconds", "Seconds from a request to the first text of an answer.",
            ["path"], buckets=SECONDS, registry=self.registry,
        )  # fmt: skip

    def watch(self, engine: Any) -> None:
        """Tell what the engine counts, too."""
        self.registry.register(_OfEngine(engine))

    def text(self) -> bytes:
        """All of it, in the text format of Prometheus."""
        return generate_latest(self.registry)


class _OfEngine:
    """A collector that reads an engine's counters when it is asked."""

    def __init__(self, engine: Any):
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        """The counters."""
        for name, told in OF_ENGINE.items():
            family = CounterMetricFamily(f"ar2diff_{name}", told)
            family.add_metric([], getattr(self.engine.stats, name))
            yield family
        for name, told in NOW.items():
            yield GaugeMetricFamily(f"ar2diff_rows_{name}", told, getattr(self.engine.stats, name))
        alive = float(self.engine.alive)
        yield GaugeMetricFamily("ar2diff_engine_alive", "1 as long as answers are written.", alive)
