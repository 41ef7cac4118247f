"""A squashed picture passes each family's real processor unchanged, and a family says what its config means."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from relay_models.errors import CheckpointError, ImageError, LabelError
from relay_models.text4seg.families import registry
from relay_models.text4seg.families.family import Family
from relay_models.text4seg.families.registry import family_of, needs_conversion, require_family, supports
from relay_models.text4seg.prompts import Subject, question

LLAVA = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"model_type": "llama", "vocab_size": 32064},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
    "vision_feature_select_strategy": "default",
}
INTERNVL2 = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "template": "internlm2-chat",
    "force_image_size": 448,
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "llm_config": {"architectures": ["InternLM2ForCausalLM"]},
    "vision_config": {"image_size": 448, "patch_size": 14},
}
QWEN2_VL = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "vision_config": {"patch_size": 14, "spatial_merge_size": 2},
}
QWEN2_5_VL = QWEN2_VL | {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
DEEPSEEK_VL2 = {
    "model_type": "deepseek_vl_v2",
    "candidate_resolutions": [[384, 384], [384, 768], [768, 384], [384, 1152], [768, 768], [1152, 1152]],
    "vision_config": {"patch_size": 14, "image_size": 384},
    "projector_config": {"downsample_ratio": 2},
}
RELAY_SEG = {"architectures": ["RelaySegForConditionalGeneration"], "model_type": "relay_seg"}
CONFIGS = {
    "llava15": LLAVA,
    "internvl2": INTERNVL2,
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "deepseek_vl2": DEEPSEEK_VL2,
    "relay_seg": RELAY_SEG,
}
SHAPES = [(640, 480), (33, 500), (1, 1), (2000, 100), (448, 448)]


def photo(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 10_000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def normalised(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    pixels_HWC = np.asarray(image, dtype=np.float64) / 255
    return ((pixels_HWC - mean) / std).transpose(2, 0, 1)


def family_named(name: str) -> Family:
    family = family_of(CONFIGS[name])
    assert family is not None
    return family


# ------------------------------------------------------------------------------------------------ which family


@pytest.mark.parametrize("name", CONFIGS)
def test_each_config_is_of_one_family(name):
    claims = {module for module, from_config in registry.adapters().items() if from_config(CONFIGS[name], "")}
    assert claims == {"qwen2_vl" if name == "qwen2_5_vl" else name}
    assert supports(CONFIGS[name])
    assert require_family(CONFIGS[name]) == family_of(CONFIGS[name])
    assert len({family_of(CONFIGS[name]), family_of(CONFIGS[name])}) == 1, "families are values"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": None},
        {"architectures": "LlavaForConditionalGeneration"},
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        LLAVA | {"vision_config": {"model_type": "pixtral", "image_size": 1024}},
        INTERNVL2 | {"template": "internvl2_5"},
        DEEPSEEK_VL2 | {"architectures": ["DeepseekOCRForCausalLM"]},
        {"architectures": ["DeepseekVLV2ForCausalLM"], "model_type": "something_else"},
    ],
)
def test_other_models_are_of_none(config):
    assert family_of(config) is None
    assert not supports(config)
    with pytest.raises(CheckpointError, match="of no segmentation family: use one of deepseek_vl2, internvl2"):
        require_family(config, "org/model")


def test_upstreams_layout_is_sent_to_the_conversion():
    config = {"architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama"}
    assert needs_conversion(config)
    assert not needs_conversion(LLAVA)
    with pytest.raises(CheckpointError, match="vllm-relay convert text4seg lmc22/text4seg-llava-7b-p24 DST"):
        require_family(config, "lmc22/text4seg-llava-7b-p24")


def test_a_family_is_added_by_one_file(tmp_path, monkeypatch):
    (tmp_path / "tiny_family.py").write_text(
        "from dataclasses import replace\n"
        "from relay_models.text4seg.families import llava15\n"
        "def from_config(config, model_id=''):\n"
        "    if config.get('architectures') != ['TinyModel']:\n"
        "        return None\n"
        "    return replace(llava15.from_config({'architectures': [llava15.ARCHITECTURE]}), name='tiny')\n"
    )
    config = {"architectures": ["TinyModel"]}
    assert family_of(config) is None
    monkeypatch.setattr(registry.families, "__path__", [*registry.families.__path__, str(tmp_path)])
    family = family_of(config)
    sys.modules.pop("relay_models.text4seg.families.tiny_family")
    assert family is not None
    assert family.name == "tiny"
    assert family_of(LLAVA).name == "llava-1.5", "the others are asked as before"


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("llava15", {"vision_config": {"image_size": 0}}, "vision_config.image_size"),
        ("llava15", {"vision_config": {"image_size": "336"}}, "vision_config.image_size"),
        ("llava15", {"vision_config": {"image_size": 10**9}}, "vision_config.image_size"),
        ("llava15", {"vision_config": {"image_size": 14, "patch_size": 28}}, "num_image_tokens"),
        ("llava15", {"vision_config": [336]}, "vision_config"),
        ("llava15", {"text4seg": {"grid": 0}}, "grid"),
        ("llava15", {"text4seg": {"grid": True}}, "grid"),
        ("llava15", {"text4seg": {"style": "shakespeare"}}, "style"),
        ("llava15", {"text4seg": "24"}, "text4seg"),
        ("internvl2", {"force_image_size": True}, "force_image_size"),
        ("internvl2", {"downsample_ratio": float("nan")}, "downsample_ratio"),
        ("internvl2", {"downsample_ratio": 0}, "downsample_ratio"),
        ("qwen2_vl", {"vision_config": {"patch_size": 15}}, "vision_config"),
        ("deepseek_vl2", {"candidate_resolutions": [[384, 768]]}, "candidate_resolutions"),
        ("deepseek_vl2", {"candidate_resolutions": []}, "candidate_resolutions"),
        ("deepseek_vl2", {"candidate_resolutions": 384}, "candidate_resolutions"),
        ("deepseek_vl2", {"candidate_resolutions": [["x", 1]]}, "candidate_resolutions"),
        ("deepseek_vl2", {"candidate_resolutions": [[-1, -1]]}, "candidate_resolutions"),
        ("relay_seg", {"image_side": 0}, "image_side"),
        ("relay_seg", {"grid": 129}, "grid"),
        ("relay_seg", {"text4seg": {"grid": 0}}, "grid"),
    ],
)
def test_an_impossible_config_is_refused_by_name(name, change, field):
    with pytest.raises(CheckpointError, match=field.replace(".", r"\.")):
        family_of(CONFIGS[name] | change)


# ------------------------------------------------------------------------------------------------ grid


def test_internvl2_has_the_towers_side_where_none_is_forced():
    family = family_of(INTERNVL2 | {"force_image_size": None, "vision_config": {"image_size": 224, "patch_size": 14}})
    assert (family.image_side, family.num_image_tokens) == (224, 64)


@pytest.mark.parametrize(
    ("model_id", "written", "grid", "opening"),
    [
        ("llava-hf/llava-1.5-7b-hf", None, 16, "USER: "),
        ("lmc22/text4seg-llava-7b-p24", None, 24, "A chat"),
        ("LMC22/Text4Seg-LLaVA-7B-P24", None, 24, "A chat"),
        ("/models/mine-p24/", None, 24, "USER: "),
        ("/models-p32/mine_p16", None, 16, "USER: "),
        ("someone/llava-p64.v2", None, 64, "USER: "),
        ("someone/llava-p240", None, 16, "USER: "),
        ("someone/llava-exp24", None, 16, "USER: "),
        ("someone/llava-p24", {"grid": 32, "style": "vicuna"}, 32, "A chat"),
        ("lmc22/text4seg-llava-7b-p24", {"style": "plain"}, 24, "USER: "),
    ],
)
def test_the_grid_and_style_come_from_the_first_who_knows(model_id, written, grid, opening):
    family = family_of(LLAVA | ({"text4seg": written} if written else {}), model_id)
    assert family.grid == grid
    assert family.prompt("x").startswith(opening)


def test_another_grid_may_be_asked_for():
    family = family_named("llava15")
    assert family.with_grid(24).grid == 24
    assert family.grid == 16
    with pytest.raises(CheckpointError, match="grid must be a whole number from 1 to 128, got 129"):
        family.with_grid(129)


# ------------------------------------------------------------------------------------------------ picture


@pytest.mark.parametrize("name", CONFIGS)
def test_squashing_maps_each_cell_of_the_original_to_the_same_cell_of_the_square(name):
    """A picture of 4 by 3 coloured blocks keeps each block where its share of width and height is."""
    family = family_named(name)
    colours_RC3 = np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7
    picture = Image.fromarray(np.repeat(np.repeat(colours_RC3, 150, axis=0), 90, axis=1))
    square_HWC = np.asarray(family.squash(picture))
    assert square_HWC.shape == (family.image_side, family.image_side, 3)
    for row in range(3):
        for column in range(4):
            y, x = ((2 * row + 1) * family.image_side // 6, (2 * column + 1) * family.image_side // 8)
            assert square_HWC[y, x].tolist() == colours_RC3[row, column].tolist()


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "CMYK", "I;16"])
def test_only_rgb_is_squashed(mode):
    with pytest.raises(ImageError, match=f"must have mode RGB, got {mode}"):
        family_named("llava15").squash(Image.new(mode, (8, 8)))


def test_squashing_is_pils_own_resize_as_in_training():
    picture = photo(63, 111)
    assert np.array_equal(np.asarray(family_named("llava15").squash(picture)), np.asarray(picture.resize((336, 336))))


def test_a_square_of_the_right_side_stays_as_it_is():
    family = family_named("llava15")
    square = photo(336, 336)
    assert np.array_equal(np.asarray(family.squash(square)), np.asarray(square))


@pytest.mark.parametrize("shape", SHAPES)
def test_llavas_processor_leaves_the_square_alone(shape):
    from transformers import CLIPImageProcessor

    family = family_named("llava15")
    square = family.squash(photo(*shape))
    # as published for LLaVA-1.5: the shorter side to 336, then the centre of 336 by 336
    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    pixels_BCHW = processor(square, return_tensors="np")["pixel_values"]
    expected_CHW = normalised(square, processor.image_mean, processor.image_std)
    np.testing.assert_allclose(pixels_BCHW[0], expected_CHW, atol=1e-4)
    assert family.num_image_tokens == (pixels_BCHW.shape[2] // 14) * (pixels_BCHW.shape[3] // 14) == 576


def test_llavas_processor_would_crop_what_is_not_squashed():
    """Why pictures are squashed first; if this changes, so may we."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    wide = Image.new("RGB", (640, 320))
    wide.paste((255, 255, 255), (0, 0, 150, 320))  # all of it left of the centre
    pixels_BCHW = processor(wide, return_tensors="np")["pixel_values"]
    assert pixels_BCHW.std(axis=(2, 3)).max() < 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "change", [{}, {"dynamic_image_size": False}, {"min_dynamic_patch": 2}, {"use_thumbnail": False}]
)
def test_internvls_processor_makes_one_tile_of_the_square(shape, change):
    from vllm.transformers_utils.processors.internvl import IMAGENET_MEAN, IMAGENET_STD, InternVLImageProcessor

    config = INTERNVL2 | change
    family = family_of(config)
    square = family.squash(photo(*shape))
    names = ("min_dynamic_patch", "max_dynamic_patch", "dynamic_image_size", "use_thumbnail")
    processor = InternVLImageProcessor(
        448, **({name: config[name] for name in names} | dict(family.mm_processor_kwargs))
    )
    processed = processor(square, return_tensors="np")
    assert processed["image_num_patches"].tolist() == [1]
    expected_CHW = normalised(square, IMAGENET_MEAN, IMAGENET_STD)
    np.testing.assert_allclose(processed["pixel_values_flat"][0], expected_CHW, atol=1e-5)
    assert family.num_image_tokens == 256


def test_internvls_processor_would_tile_what_is_not_squashed():
    from vllm.transformers_utils.processors.internvl import InternVLImageProcessor

    processor = InternVLImageProcessor(448, 1, 12, True, True)
    assert processor(photo(640, 480), return_tensors="np")["image_num_patches"].tolist() == [13]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored_bounds", [{}, {"min_pixels": 500_000}, {"max_pixels": 100_000}])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_qwens_processor_leaves_the_square_alone(shape, stored_bounds, name):
    from transformers import Qwen2VLImageProcessor

    family = family_named(name)
    square = family.squash(photo(*shape))
    processor = Qwen2VLImageProcessor(**stored_bounds)
    processed = processor(square, return_tensors="np", **family.mm_processor_kwargs)
    assert processed["image_grid_thw"].tolist() == [[1, 32, 32]]
    assert family.num_image_tokens == 32 * 32 // processor.merge_size**2 == 256
    # patches lie in groups of 2 by 2, each [channel, time, row, column]; back to a picture
    patches = processed["pixel_values"].reshape(16, 16, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    pixels_CHW = patches.transpose(4, 0, 2, 5, 1, 3, 6).reshape(3, 448, 448)
    expected_CHW = normalised(square, processor.image_mean, processor.image_std)
    np.testing.assert_allclose(pixels_CHW, expected_CHW, atol=1e-4)


def test_qwens_pinned_bounds_are_the_published_ones_and_needed():
    """Other pictures are seen as ever, and a folder with other bounds would have rescaled the square."""
    from transformers import Qwen2VLImageProcessor

    size = family_named("qwen2_vl").mm_processor_kwargs["size"]
    assert size == {"shortest_edge": 3136, "longest_edge": 12845056}
    square = family_named("qwen2_vl").squash(photo(640, 480))
    rescaled = Qwen2VLImageProcessor(max_pixels=100_000)(square, return_tensors="np")
    assert rescaled["image_grid_thw"].tolist() != [[1, 32, 32]]


@pytest.fixture(scope="module")
def deepseek_processor():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from vllm.transformers_utils.processors.deepseek_vl2 import DeepseekVLV2Processor

    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2, "<unk>": 3}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    sizes = tuple(tuple(size) for size in DEEPSEEK_VL2["candidate_resolutions"])
    return DeepseekVLV2Processor(tokenizer, candidate_resolutions=sizes, patch_size=14, downsample_ratio=2)


@pytest.mark.parametrize("shape", SHAPES)
def test_deepseeks_processor_makes_one_tile_of_the_square(shape, deepseek_processor):
    family = family_named("deepseek_vl2")
    square = family.squash(photo(*shape))
    processed = deepseek_processor(text="<image>", images=[square])
    assert processed["images_spatial_crop"].tolist() == [[1, 1]]
    assert processed["num_image_tokens"].tolist() == [family.num_image_tokens] == [421]
    expected_CHW = normalised(square, (0.5,) * 3, (0.5,) * 3)
    assert processed["pixel_values"].shape == (2, 3, 384, 384)
    for view_CHW in processed["pixel_values"].numpy():
        np.testing.assert_allclose(view_CHW, expected_CHW, atol=1e-5)


def test_deepseeks_processor_would_pad_what_is_not_squashed(deepseek_processor):
    processed = deepseek_processor(text="<image>", images=[photo(640, 300)])
    assert processed["images_spatial_crop"].tolist() != [[1, 1]]


# ------------------------------------------------------------------------------------------------ prompt

PUBLISHED_PROMPTS = {
    "llava15": "USER: <image>\nWhere?\nASSISTANT:",
    "internvl2": (
        "<|im_start|>system\n你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
        "是一个有用无害的人工智能助手。<|im_end|><|im_start|>user\n<image>\nWhere?<|im_end|><|im_start|>assistant\n"
    ),
    "qwen2_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen2_5_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>Where?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "deepseek_vl2": "<|User|>: <image>\nWhere?\n\n<|Assistant|>:",
    "relay_seg": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    ),
}
VICUNA_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\nWhere? ASSISTANT:"
)


def rendered(family: Family, messages: list[dict], **values: object) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(family.conversation.chat_template())
    return template.render(messages=messages, **{"bos_token": "<BOS>", "add_generation_prompt": True, **values})


def asked(text: str, images: int = 1) -> dict:
    return {"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}


def test_the_prompts_are_the_ones_models_were_trained_with():
    assert {name: family_named(name).prompt("Where?") for name in CONFIGS} == PUBLISHED_PROMPTS
    assert family_of(LLAVA, "lmc22/text4seg-llava-7b-p24").prompt("Where?") == VICUNA_PROMPT


@pytest.mark.parametrize("name", CONFIGS)
def test_all_questions_about_a_picture_share_everything_up_to_its_end(name):
    family = family_named(name)
    prompts = [family.prompt(question(Subject.refer(text))) for text in ("the dog", "a cat", "zebra, number 5")]
    head, *_ = prompts[0].partition(family.conversation.image)
    assert all(prompt.startswith(head + family.conversation.image) for prompt in prompts)
    assert all(prompt.count(family.conversation.image) == 1 for prompt in prompts)


@pytest.mark.parametrize("name", [*CONFIGS, "vicuna"])
def test_the_chat_template_says_what_the_prompt_says(name):
    family = family_of(LLAVA, "lmc22/text4seg-llava-7b-p24") if name == "vicuna" else family_named(name)
    bos = "<BOS>" if family.conversation.begins_text else ""
    assert rendered(family, [asked("Where?")]) == bos + family.prompt("Where?")
    assert bool(bos) == (name not in ("qwen2_vl", "qwen2_5_vl", "relay_seg"))


def test_turns_follow_one_another_as_in_training():
    messages = [asked("Where?"), {"role": "assistant", "content": " There."}, {"role": "user", "content": "And now?"}]
    chats = {
        "llava15": "<BOS>USER: <image>\nWhere?\nASSISTANT: There.</s>USER: And now?\nASSISTANT:",
        "deepseek_vl2": "<BOS><|User|>: <image>\nWhere?\n\n<|Assistant|>: There.<｜end▁of▁sentence｜>"
        "<|User|>: And now?\n\n<|Assistant|>:",
        "qwen2_vl": PUBLISHED_PROMPTS["qwen2_vl"] + " There.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "internvl2": "<BOS>" + PUBLISHED_PROMPTS["internvl2"] + " There.<|im_end|><|im_start|>user\nAnd now?<|im_end|>"
        "<|im_start|>assistant\n",
    }
    for name, chat in chats.items():
        assert rendered(family_named(name), messages) == chat
    closed = rendered(family_named("llava15"), messages[:2], add_generation_prompt=False)
    assert closed == "<BOS>USER: <image>\nWhere?\nASSISTANT: There.</s>"


def test_a_message_may_hold_several_pictures_and_a_caller_his_own_system():
    assert rendered(family_named("llava15"), [asked("Both?", images=2)]) == (
        "<BOS>USER: <image>\n<image>\nBoth?\nASSISTANT:"
    )
    system = {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]}
    assert rendered(family_named("qwen2_vl"), [system, asked("Where?")]) == PUBLISHED_PROMPTS["qwen2_vl"].replace(
        "You are a helpful assistant.", "Be brief."
    )
    assert rendered(family_named("llava15"), [system, asked("Where?")]) == (
        "<BOS>Be brief.\nUSER: <image>\nWhere?\nASSISTANT:"
    )


# The template that SmolLM2-135M-Instruct was published with.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize(
    "chat",
    [
        [("user", "Hi {{ there }}\n")],
        [("system", ""), ("user", " a "), ("assistant", "\nb\n"), ("tool", "c"), ("system", "d"), ("user", "e")],
        [("tool", "c"), ("user", "d")],
    ],
)
def test_a_chat_without_pictures_is_smollm2s(chat, goes_on):
    messages = [{"role": role, "content": content} for role, content in chat]
    base = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(SMOLLM2_TEMPLATE)
    said = base.render(messages=messages, add_generation_prompt=goes_on)
    family = family_named("relay_seg")
    assert rendered(family, messages, add_generation_prompt=goes_on) == said
    in_parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
    assert rendered(family, in_parts, add_generation_prompt=goes_on) == said


def test_smollm2s_pictures_come_before_the_texts_of_their_message():
    parts = [
        {"type": kind, **({"text": kind} if kind == "text" else {})} for kind in ("text", "image", "text", "image")
    ]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    assert rendered(family_named("relay_seg"), chat, add_generation_prompt=False).endswith(
        "<|im_start|>user\n<image>\n<image>\ntext\ntext<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_vllm_hands_the_template_lists_of_parts(name):
    """A template it took for one of strings would get the pictures put into the text by vLLM's own rule."""
    from vllm.renderers.hf import _detect_content_format

    template = family_named(name).conversation.chat_template()
    assert _detect_content_format(template, default="string") == "openai"


@pytest.mark.parametrize("name", CONFIGS)
def test_text_with_a_meaning_of_its_own_is_refused(name):
    family = family_named(name)
    for reserved in family.reserved:
        with pytest.raises(LabelError, match="question holds"):
            family.prompt(f"Please segment only the {reserved} in the image.")
        with pytest.raises(LabelError, match=r"expressions\[3\] holds"):
            family.check_text("expressions[3]", f"a{reserved}")
    marker = family.conversation.image.strip()
    assert any(reserved in marker for reserved in family.reserved)
    family.check_text("question", "a < b, <seg> and | im_start")


# ------------------------------------------------------------------------------------------------ against vLLM


def test_architectures_are_vllms():
    from vllm.model_executor.models.registry import ModelRegistry

    names = {family_named(name).architecture for name in CONFIGS if name != "relay_seg"}
    assert names <= set(ModelRegistry.get_supported_archs())
    assert len(names) == 5


KNOWS_OUR_MODEL = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from transformers import AutoConfig
from vllm.model_executor.models.interfaces import supports_multimodal
from vllm.model_executor.models.registry import ModelRegistry
model = ModelRegistry.models.get(sys.argv[1])
assert "relay_serving.vllm_plugin.relay_seg" not in sys.modules, "it is imported where it is served"
if model is not None:
    assert supports_multimodal(model.load_model_cls())
    assert AutoConfig.for_model("relay_seg").grid == 16
print("known" if model is not None else "unknown")
"""


@pytest.mark.parametrize(("plugins", "is_known"), [("relay", True), ("", False)])
def test_our_own_architecture_is_known_to_vllm_where_relay_is_asked_for(plugins, is_known, make_environment):
    command = [sys.executable, "-c", KNOWS_OUR_MODEL, family_named("relay_seg").architecture]
    environment = make_environment(VLLM_PLUGINS=plugins)
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == ("known" if is_known else "unknown")


def test_relay_segs_processing_leaves_the_square_alone():
    from relay_models.relay_seg.configuration import RelaySegConfig
    from relay_models.relay_seg.encoder import MEAN_RGB, STD_RGB
    from relay_models.relay_seg.processing import pixel_values_of
    from relay_models.text4seg.families.relay_seg import IMAGE_TOKEN

    family, config = family_named("relay_seg"), RelaySegConfig()
    assert (family.grid, family.image_side, family.num_image_tokens) == (16, 512, 256)
    assert (config.grid, config.image_side, config.num_image_tokens) == (16, 512, 256)
    assert IMAGE_TOKEN in family.conversation.image
    pictures = [photo(*shape) for shape in SHAPES]
    pixels_N3HW = pixel_values_of(pictures, config.image_side).numpy()
    for picture, pixels_3HW in zip(pictures, pixels_N3HW, strict=True):
        np.testing.assert_allclose(pixels_3HW, normalised(family.squash(picture), MEAN_RGB, STD_RGB), atol=1e-5)
        np.testing.assert_array_equal(pixel_values_of([family.squash(picture)], 512)[0], pixels_3HW)


@pytest.mark.parametrize("image", [np.zeros((8, 8, 3), dtype=np.uint8), Image.new("RGBA", (8, 8))])
def test_relay_seg_takes_upright_rgb_pictures_and_nothing_else(image):
    from relay_models.relay_seg.processing import pixel_values_of

    with pytest.raises(
        ImageError, match=r"images\[1\] must be a PIL picture, got ndarray|must have mode RGB, got RGBA"
    ):
        pixel_values_of([photo(8, 8), image], 512)


def test_importing_the_families_is_light():
    program = (
        "from relay_models.text4seg.families.registry import family_of; import sys; family_of({});"
        "assert not {'torch', 'transformers', 'vllm', 'PIL', 'numpy'} & set(sys.modules), sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr
