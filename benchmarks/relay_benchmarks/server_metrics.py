"""What a server counts, read from its /metrics: relay's counters, if it has them, and vLLM's beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

# column: sample; the counters of all engines are added up
RELAY_SAMPLES = {
    "relay_steps": "vllm_relay_relay_steps_total",
    "eligible_steps": "vllm_relay_eligible_steps_total",
    "steps": "vllm_relay_steps_total",
    "layer_calls": "vllm_relay_relay_layers_total",
    "kv_tokens_saved": "vllm_relay_kv_tokens_saved_total",
    "grouped_requests": "vllm_relay_grouped_requests_total",
    "groups": "vllm_relay_groups_total",
    "planning_us": "vllm_relay_planning_seconds_total",
}
VLLM_SAMPLES = {
    "prefix_queries": "vllm:prefix_cache_queries_total",
    "prefix_hits": "vllm:prefix_cache_hits_total",
    "preemptions": "vllm:num_preemptions_total",
}
_SCALE = {"planning_us": 1e6}
_FALLBACKS = "vllm_relay_fallbacks_total"
_CACHE_CONFIG = "vllm:cache_config_info"


@dataclass(frozen=True)
class Reading:
    """One scrape.

    Attributes:
        counts: by column; relay's are absent where the server does not count them.
        fallbacks: of relay, by reason.
        block_size: tokens of a cache block; None if the server does not say.
    """

    counts: Mapping[str, float]
    fallbacks: Mapping[str, float]
    block_size: int | None

    @property
    def has_relay(self) -> bool:
        """Whether an engine of the server has relay's counters, which is so only where its attention is relay's."""
        return "steps" in self.counts

    def since(self, before: Reading) -> Reading:
        """What was counted between the two."""
        return Reading(_gained(self.counts, before.counts), _gained(self.fallbacks, before.fallbacks), self.block_size)


def read(text: str) -> Reading:
    """Raises ValueError if the text is none of Prometheus."""
    from prometheus_client.parser import text_string_to_metric_families

    columns = {sample: column for column, sample in (RELAY_SAMPLES | VLLM_SAMPLES).items()}
    counts: dict[str, float] = defaultdict(float)
    fallbacks: dict[str, float] = defaultdict(float)
    block_size = None
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in columns:
                column = columns[sample.name]
                counts[column] += sample.value * _SCALE.get(column, 1)
            elif sample.name == _FALLBACKS:
                fallbacks[sample.labels["reason"]] += sample.value
            elif sample.name == _CACHE_CONFIG and sample.labels.get("block_size", "").isdigit():
                block_size = int(sample.labels["block_size"])
    return Reading(dict(counts), dict(fallbacks), block_size)


def _gained(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}
