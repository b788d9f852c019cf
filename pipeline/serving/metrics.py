"""The metrics that Prometheus reads from the server."""

from collections.abc import Callable
from typing import get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric

from pipeline.serving.openai import Outcome

FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# The time at which a counter began doubles the list, and Prometheus sees it by itself.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "pipeline_requests", "Requests for completions, by how they ended", ["outcome"], registry=self._registry
        )
        for outcome in get_args(Outcome):
            self.requests.labels(outcome)
        self.time_to_first_token = Histogram(
            "pipeline_time_to_first_token_seconds",
            "From the arrival of a request to the first token of a continuation",
            buckets=FIRST_TOKEN_SECONDS,
            registry=self._registry,
        )
        self.time_between_tokens = Histogram(
            "pipeline_time_between_tokens_seconds",
            "From a token of a continuation to the next",
            buckets=BETWEEN_TOKENS_SECONDS,
            registry=self._registry,
        )
        self.prompt_tokens = Counter("pipeline_prompt_tokens", "Tokens of prompts taken", registry=self._registry)
        self.reused_prompt_tokens = Counter(
            "pipeline_reused_prompt_tokens",
            "Tokens of prompts that were not read, because a slot of the cache held them",
            registry=self._registry,
        )
        self.generated_tokens = Counter("pipeline_generated_tokens", "Tokens drawn", registry=self._registry)

    def on_tokens(self, count: int, seconds: float, reused: int | None) -> None:
        """Count new tokens of a continuation, `seconds` after its last one.

        With its first ones, those are since its request, and `reused` tokens of its prompt were not read; else it is
        None.
        """
        self.generated_tokens.inc(count)
        if reused is not None:
            self.time_to_first_token.observe(seconds)
            self.reused_prompt_tokens.inc(reused)
        else:
            self.time_between_tokens.observe(seconds / count)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a number that is read when Prometheus asks."""
        Gauge(name, text, registry=self._registry).set_function(read)

    def model_info(self, read: Callable[[], dict[str, str]]) -> None:
        """Add the labels of the served model, which are read when Prometheus asks."""
        self._registry.register(_ModelInfo(read))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _ModelInfo:
    def __init__(self, read: Callable[[], dict[str, str]]) -> None:
        self._read = read

    def collect(self) -> list[Metric]:
        labels = self._read()
        family = GaugeMetricFamily("pipeline_model_info", "The model that takes new requests", labels=list(labels))
        family.add_metric(list(labels.values()), 1)
        return [family]
