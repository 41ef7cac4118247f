"""The counters of the engine that this process works for: one file an engine, written by its first rank."""

from __future__ import annotations

from functools import cache

from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from relay_serving.vllm_plugin.counters import CounterFile

logger = init_logger("vllm.relay")


def counters_of(vllm_config: VllmConfig) -> CounterFile:
    """The same for all KV-cache groups; of ranks that must not count twice, one that nobody sees."""
    is_first_rank = get_tensor_model_parallel_rank() == 0 and get_pp_group().is_first_rank
    return _counters(vllm_config.instance_id, vllm_config.parallel_config.data_parallel_index, is_first_rank)


@cache
def _counters(instance_id: str, engine: int, is_first_rank: bool) -> CounterFile:
    if not is_first_rank:
        return CounterFile.private()
    try:
        return CounterFile.create(instance_id, engine)
    except OSError as error:
        logger.warning("RelayAttention works, but its counters cannot be shown on /metrics: %s", error)
        return CounterFile.private()
