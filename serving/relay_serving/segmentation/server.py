"""Puts segmentation into a running server's state: the service behind /v1/segmentations, and the chat that segments."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

from relay_models.images import ImageLimits
from relay_serving.segmentation.chat import SegmentingChat
from relay_serving.segmentation.generation import Generator
from relay_serving.segmentation.grammars import Grammars
from relay_serving.segmentation.media import PictureReader
from relay_serving.segmentation.profile import SegmentationProfile, resolve
from relay_serving.segmentation.refining import Refining
from relay_serving.segmentation.refining import resolve as resolve_refiner
from relay_serving.segmentation.service import SegmentationService
from relay_serving.settings import RelaySettings, cache_folder

LARGEST_PICTURE = 64 << 20  # bytes of a file; vLLM reads up to 256 MiB of any medium
MOST_PIXELS = 50_000_000


def install(engine_client: Any, state: Any, settings: RelaySettings) -> SegmentationProfile | None:
    """Raises CheckpointError where a grid was asked for and the model cannot have one, or a refiner cannot be had."""
    model_config = engine_client.vllm_config.model_config
    chat = state.openai_serving_chat
    if chat is None or model_config.multimodal_config is None:
        return None
    profile = resolve(settings.segmentation, model_config.hf_config.to_dict(), model_config.model)
    if profile is None:
        return None
    if state.args.chat_template is None:
        _speak_as_trained(chat, state.online_renderer, profile)
    refiner = resolve_refiner(settings.refiner, cache_folder() / "models")
    refining = None if refiner is None else Refining(refiner, timeout=settings.refiner_timeout)
    reader = _reader(model_config, profile, refining)
    _leave_squares_alone(model_config.multimodal_config, profile)
    generator = Generator(chat, engine_client)
    tokenizer = generator.tokenizer
    grammars = Grammars(
        profile.rows, profile.columns, lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    )
    state.segmentation = SegmentationService(
        reader,
        generator,
        profile,
        grammars,
        model_name=state.openai_serving_models.model_name(),
        most_queries=settings.segmentation_queries,
        refining=refining,
    )
    if refining is not None:
        refining.start()
    state.openai_serving_chat = SegmentingChat(
        chat,
        reader,
        profile,
        structural_tag=grammars.chat(),
        speculates=engine_client.vllm_config.speculative_config is not None,
    )
    return profile


def _speak_as_trained(chat: Any, online_renderer: Any, profile: SegmentationProfile) -> None:
    """Descriptors were trained in the family's own words; the template a model was published with may have others."""
    template = profile.family.conversation.chat_template()
    chat.chat_template = online_renderer.chat_template = template


def _leave_squares_alone(multimodal_config: Any, profile: SegmentationProfile) -> None:
    """What the family needs of the processor, which runs in this process; what `--mm-processor-kwargs` chose stays."""
    needed, chosen = profile.family.mm_processor_kwargs, multimodal_config.mm_processor_kwargs or {}
    multimodal_config.mm_processor_kwargs = {**needed, **chosen} or None


def _reader(model_config: Any, profile: SegmentationProfile, refining: Refining | None) -> PictureReader:
    """Pictures under vLLM's media rules, and under the smaller of vLLM's limits and ours."""
    connector = MEDIA_CONNECTOR_REGISTRY.load(
        envs.VLLM_MEDIA_CONNECTOR,
        allowed_local_media_path=model_config.allowed_local_media_path,
        allowed_media_domains=model_config.allowed_media_domains,
    )
    pixels = envs.VLLM_MAX_IMAGE_PIXELS
    limits = ImageLimits(max_bytes=LARGEST_PICTURE, max_pixels=min(pixels, MOST_PIXELS) if pixels > 0 else MOST_PIXELS)
    refiner_view = None if refining is None else refining.view
    return PictureReader(connector, limits, envs.VLLM_IMAGE_FETCH_TIMEOUT, profile.family.squash, refiner_view)
