"""The names, shapes and configs of a LLaVA-1.5 model, in every spelling it comes in.

One spelling is everybody's here: llava-hf's before transformers 4.52, which is what vLLM reads. What the original LLaVA
code, later transformers and CLIP call their tensors is translated to it, and the tensors a model must have, and no
others, follow from its config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from relay_models.errors import CheckpointError

MAX_LAYERS = 1000  # a config is untrusted, and names are made for every layer it counts

EMBEDDING = "language_model.model.embed_tokens.weight"
OUTPUT = "language_model.lm_head.weight"

# Old prefix, new prefix; the first that fits is taken. Upstream's names, llava-hf's before and after transformers 4.52.
MODEL_NAMES = (
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("vision_tower.vision_model.", "vision_tower.vision_model."),
    ("vision_tower.", "vision_tower.vision_model."),
    ("model.language_model.", "language_model.model."),
    ("language_model.", "language_model."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)
# Of a CLIP model of its own, before and after transformers 5; its text half is nobody's here.
TOWER_NAMES = (
    ("vision_model.", "vision_tower.vision_model."),
    ("embeddings.", "vision_tower.vision_model.embeddings."),
    ("encoder.", "vision_tower.vision_model.encoder."),
    ("pre_layrnorm.", "vision_tower.vision_model.pre_layrnorm."),
    ("post_layernorm.", "vision_tower.vision_model.post_layernorm."),
)

# The towers a checkpoint may name without their config being at hand.
KNOWN_TOWERS: Mapping[str, Mapping[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
}


def target_name(name: str, renames: Iterable[tuple[str, str]]) -> str | None:
    """What a tensor is called here; None if no spelling in ``renames`` fits."""
    for old, new in renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def follows_from_config(target: str) -> bool:
    """Whether a tensor only repeats what the config says, as old code saves some."""
    return target.endswith((".rotary_emb.inv_freq", ".embeddings.position_ids"))


def expected_shapes(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a llava-hf model, before its vocabulary grows.

    Args:
        text, vision: the configs of Llama and of CLIP's vision tower; what they leave out has its class's default.

    Raises:
        CheckpointError: the configs are of no LLaVA-1.5: impossible sizes, biases, tied embeddings.
    """
    text_config, vision_config = llama_config(text), clip_config(vision)
    _check_sizes(text_config, "vocab_size", "num_key_value_heads", "head_dim")
    _check_sizes(vision_config, "image_size", "patch_size", "num_channels")
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        if getattr(text_config, name):
            raise CheckpointError(f"{name} in the language model's config must be false, got true")
    return {
        **_llama_shapes(text_config),
        **_clip_shapes(vision_config),
        "multi_modal_projector.linear_1.weight": (text_config.hidden_size, vision_config.hidden_size),
        "multi_modal_projector.linear_1.bias": (text_config.hidden_size,),
        "multi_modal_projector.linear_2.weight": (text_config.hidden_size, text_config.hidden_size),
        "multi_modal_projector.linear_2.bias": (text_config.hidden_size,),
    }


def _check_sizes(config: Any, *names: str) -> None:
    """Those named and the ones both halves have: configs are untrusted, and are multiplied and divided by."""
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", *names):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{name} of {config.model_type} must be a whole number of at least 1, got {value!r}")
    if not 1 <= config.num_hidden_layers <= MAX_LAYERS:
        raise CheckpointError(
            f"num_hidden_layers of {config.model_type} must be from 1 to {MAX_LAYERS}, got {config.num_hidden_layers}"
        )


def _llama_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    layers = {
        f"language_model.model.layers.{i}.{name}.weight": shape
        for i in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    embedding = (config.vocab_size, width)
    return {EMBEDDING: embedding, **layers, "language_model.model.norm.weight": (width,), OUTPUT: embedding}


def _clip_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    linear = {
        **{f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")},
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    tower = "vision_tower.vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}.embeddings.class_embedding": (width,),
        f"{tower}.embeddings.patch_embedding.weight": (width, config.num_channels, patch, patch),
        f"{tower}.embeddings.position_embedding.weight": ((config.image_size // patch) ** 2 + 1, width),
    }
    for i in range(config.num_hidden_layers):
        for name, shape in linear.items():
            shapes[f"{tower}.encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"{tower}.encoder.layers.{i}.{name}.bias"] = shape[:1]
    norms = [f"encoder.layers.{i}.layer_norm{n}" for i in range(config.num_hidden_layers) for n in (1, 2)]
    for norm in (*norms, "pre_layrnorm", "post_layernorm"):
        shapes[f"{tower}.{norm}.weight"] = shapes[f"{tower}.{norm}.bias"] = (width,)
    return shapes


def llama_config(text: Mapping[str, Any]) -> Any:
    """Transformers' LlamaConfig. Raises CheckpointError for values it does not take."""
    from transformers import LlamaConfig

    return _known_config(LlamaConfig, text)


def clip_config(vision: Mapping[str, Any]) -> Any:
    """Transformers' CLIPVisionConfig. Raises CheckpointError for values it does not take."""
    from transformers import CLIPVisionConfig

    return _known_config(CLIPVisionConfig, vision)


def _known_config(kind: Any, values: Mapping[str, Any]) -> Any:
    """Of a config's values those the class knows: upstream's file mixes the language model's with its own."""
    from huggingface_hub.errors import StrictDataclassError

    known = kind().to_dict().keys() | {"rope_theta", "rope_scaling"}
    dropped = {"architectures", "dtype", "model_type", "transformers_version"}
    try:
        return kind(**{name: value for name, value in values.items() if name in known - dropped and value is not None})
    except (TypeError, ValueError, ArithmeticError, StrictDataclassError) as error:
        raise CheckpointError(f"{kind.__name__} cannot be made of config.json: {error}") from error
