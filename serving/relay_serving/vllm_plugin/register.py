"""Entry point of the group ``vllm.general_plugins``: puts relay's attention backend in the place of vLLM's.

And makes our own model class known, of which nothing is imported before such a model is served.

vLLM calls `register` in every one of its processes, sometimes twice. Without being asked for by name it does nothing:
vLLM loads every plugin it finds when VLLM_PLUGINS is unset, and installing a package must not change a plain
``vllm serve``.
"""

from __future__ import annotations

import logging
import os

from relay_serving import plugin_names
from relay_serving.settings import GPU_KERNEL_CARRIER, CpuKernel, GpuKernel, RelaySettings
from relay_serving.vllm_plugin import aot_load_repair

GPU_BACKENDS = {  # by the name that vLLM chooses them by
    "FLASH_ATTN": "relay_serving.vllm_plugin.gpu_flash_attn.RelayFlashBackend",
    "FLASHINFER": "relay_serving.vllm_plugin.gpu_flashinfer.RelayFlashInferBackend",
    "TRITON_ATTN": "relay_serving.vllm_plugin.gpu_backend.RelayTritonBackend",
}
BACKEND_PATH = "relay_serving.vllm_plugin.attention_backend.RelayCPUBackend"
MODEL_PATHS = {
    "RelaySegForConditionalGeneration": "relay_serving.vllm_plugin.relay_seg:RelaySegForConditionalGeneration"
}

logger = logging.getLogger("vllm.relay")


def is_asked_for() -> bool:
    """Whether VLLM_PLUGINS names relay and VLLM_RELAY does not switch it off. Raises SettingError."""
    named = [name.strip() for name in os.environ.get(plugin_names.VARIABLE, "").split(",")]
    return plugin_names.OUR_NAME in named and RelaySettings.from_environment().enabled


def register() -> None:
    """Override vLLM's attention backends in this process and add our model class, if relay is asked for."""
    if not is_asked_for():
        return
    settings = RelaySettings.from_environment()
    if settings.cpu_kernel == CpuKernel.TRITON:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated
    from vllm.platforms import current_platform

    from relay_serving.vllm_plugin.counters import run_id

    run_id()  # made before vLLM starts its other processes, which inherit it
    register_models()
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        logger.warning(
            "RelayAttention has no kernels for platform %r in this release: vLLM's own attention serves every layer.",
            current_platform.device_name,
        )
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cuda():
        if os.environ.get(GPU_KERNEL_CARRIER, settings.gpu_kernel) == GpuKernel.OFF:
            logger.warning(
                "RelayAttention is off on GPUs: vLLM's own attention serves every layer, unless "
                "--relay-gpu-kernel triton is given; no GPU has served with that yet."
            )
            return
        for name, path in GPU_BACKENDS.items():
            register_backend(AttentionBackendEnum[name], path)
        return
    aot_load_repair.repair()
    register_backend(AttentionBackendEnum.CPU_ATTN, BACKEND_PATH)


def register_models() -> None:
    """By name: the class is imported where such a model is loaded. Configs are known to transformers by their type."""
    from transformers import AutoConfig
    from vllm.model_executor.models.registry import ModelRegistry

    from relay_models.relay_seg.configuration import RelaySegConfig

    for architecture, path in MODEL_PATHS.items():
        ModelRegistry.register_model(architecture, path)
    AutoConfig.register(RelaySegConfig.model_type, RelaySegConfig, exist_ok=True)
