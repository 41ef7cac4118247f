"""Relay's counters on the server's own /metrics.

The counters belong to the worker that runs the layers; this process reads them when it is scraped (see counters.py).
They are published once for each engine, labelled as vLLM labels its own: ``model_name`` and ``engine``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from relay_serving.vllm_plugin import counters
from relay_serving.vllm_plugin.counters import CounterFile, CounterValues
from relay_serving.vllm_plugin.register import is_asked_for

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.relay")

_COUNTERS: tuple[tuple[str, str, Callable[[CounterValues], float]], ...] = (
    ("steps", "Attention steps (one a model step and KV-cache group).", lambda v: v.steps),
    ("eligible_steps", "Steps in which two or more requests held the same cached block.", lambda v: v.eligible_steps),
    ("relay_steps", "Steps in which a prefix was read once for several requests.", lambda v: v.relay_steps),
    ("relay_layers", "Layer executions that ran RelayAttention.", lambda v: v.layer_calls),
    ("groups", "Groups of requests with a common prefix, summed over relay steps.", lambda v: v.groups),
    ("grouped_requests", "Requests in such groups, summed over relay steps.", lambda v: v.grouped_requests),
    (
        "kv_tokens_saved",
        "Cached tokens read once instead of once for each request, summed over relay steps.",
        lambda v: v.kv_tokens_saved,
    ),
    ("bytes_saved", "Bytes of keys and values not read, over all relayed layers.", lambda v: v.bytes_saved),
    ("planning_seconds", "Time spent planning.", lambda v: v.planning_ns / 1e9),
)


class RelayCollector(Collector):
    """Reads every engine's counter file at each scrape."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        engines = [(str(engine), file.read()) for engine, file in find_counters() or ()]
        for name, text, value_of in _COUNTERS:
            family = CounterMetricFamily(f"vllm_relay_{name}", text, labels=("model_name", "engine"))
            for engine, values in engines:
                family.add_metric((self._model_name, engine), value_of(values))
            yield family
        family = CounterMetricFamily(
            "vllm_relay_fallbacks",
            "Layer executions or steps with a shared prefix that vLLM's own kernel served, by reason.",
            labels=("model_name", "engine", "reason"),
        )
        for engine, values in engines:
            for reason, count in values.fallbacks.items():
                family.add_metric((self._model_name, engine, reason), count)
        yield family


def attach(app: FastAPI) -> None:
    """With several API servers vLLM scrapes files of its own, so /metrics is served from here instead."""
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR") is None:
        return

    @app.get("/metrics", include_in_schema=False)
    def metrics() -> Response:
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        registry = get_prometheus_registry()
        collector = getattr(app.state, "relay_collector", None)
        if collector is not None:
            registry.register(collector)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def publish(vllm_config: VllmConfig, state: Any) -> None:
    """Show the counters of this server's engines, and say loudly if relay is not at work."""
    counters.sweep()
    found = find_counters()
    if found is not None:
        _report(vllm_config, is_active=bool(found))
    state.relay_collector = RelayCollector(str(vllm_config.model_config.served_model_name))
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR") is None:
        register_once(REGISTRY, state.relay_collector)


def find_counters() -> list[tuple[int, CounterFile]] | None:
    """Every engine's counters; None, and one line in the log, where they cannot be read: that must not end /metrics."""
    try:
        return list(counters.find())
    except (OSError, ValueError) as error:
        _warn_once(f"RelayAttention's counters cannot be shown on /metrics: {error}")
        return None


@cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def register_once(registry: CollectorRegistry, collector: RelayCollector) -> None:
    """Register, in place of a collector of ours that an earlier server in this process left."""
    for known in list(registry._collector_to_names):
        if isinstance(known, RelayCollector):
            registry.unregister(known)
    registry.register(collector)


def _report(vllm_config: VllmConfig, is_active: bool) -> None:
    """One line on what relay will not touch, or that it is absent although it was asked for."""
    model = vllm_config.model_config
    if is_active:
        if model.is_hybrid or model.use_mla:
            logger.info("RelayAttention leaves the MLA or state-space layers of this model to vLLM's own kernels.")
        return
    if model.use_mla or model.is_attention_free:
        reason = "the model has no layers it can relay (MLA or attention-free)"
    elif not is_asked_for():
        reason = "it is switched off in this process"
    else:
        reason = "no engine loaded it (see the lines above, or the platform is not CPU)"
    logger.warning("RelayAttention is NOT active: %s. vLLM's own attention serves every request.", reason)
