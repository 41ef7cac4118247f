"""LoRA of LLaVA-1.5, Qwen2-VL and InternVL: what is fed, learnt and written. Tiny models of random weights."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from relay_models.errors import CheckpointError, LabelError, RelayModelsError
from relay_models.recipes.text4seg.augment import Augmentation
from relay_models.recipes.text4seg.dataset import Instance, Photo, load_png_masks
from relay_models.recipes.text4seg.lora_adapter import merge_adapter, served_form
from relay_models.recipes.text4seg.lora_sequences import packed
from relay_models.recipes.text4seg.lora_student import LoraSizes, Student, trained_config
from relay_models.recipes.text4seg.lora_training import LoraOptions, train_lora
from relay_models.recipes.text4seg.questions import QuestionMix, class_question, ignored_spans, questions_of
from relay_models.text4seg.codec import DescriptorStatus, decode_answer
from relay_models.text4seg.families.registry import family_of
from relay_models.text4seg.profiles import Style
from tiny_internvl import make_tiny_internvl
from tiny_models import make_tiny_llava, make_tiny_qwen2_vl

pytest.importorskip("peft", reason="needs the extra `train`")

MAKERS = {"llava": make_tiny_llava, "qwen2-vl": make_tiny_qwen2_vl, "internvl": make_tiny_internvl}
GRID = 4
MIX = QuestionMix(num_absent=1, multi_class_share=1, everything_share=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: make(folder / name) for name, make in MAKERS.items()}
    for model in made.values():
        _sharpen(model / "model.safetensors")
    return made


def _sharpen(file: Path) -> None:
    """The output layer is frozen: as it is made, its logits are too near one another for any answer to be certain."""
    weights = load_file(file)
    (output,) = [name for name in weights if name.endswith("lm_head.weight")]
    weights[output] *= 4
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Photo]:
    """A red square on the left, a blue circle on the right, on wide pictures."""
    folder = tmp_path_factory.mktemp("photos")
    found = []
    for index, (label, colour, box) in enumerate(
        (("square", "red", (10, 20, 70, 80)), ("circle", "blue", (90, 30, 150, 90)))
    ):
        image, mask = Image.new("RGB", (160, 100), "white"), Image.new("1", (160, 100))
        for canvas, fill in ((image, colour), (mask, 1)):
            draw = ImageDraw.Draw(canvas)
            (draw.rectangle if label == "square" else draw.ellipse)(box, fill=fill)
        image.save(folder / f"{index}.png")
        other = "circle" if label == "square" else "square"
        instance = Instance.of(0, label, np.asarray(mask))
        found.append(Photo(f"{index}.png", 160, 100, (instance,), absent=(other,), folder=folder))
    return found


def loaded(folder: Path, sizes: LoraSizes | None = None, grid: int = GRID) -> Student:
    config = trained_config(folder, str(folder), grid, None)
    return Student.load(folder, config, sizes or LoraSizes(rank=4, alpha=8, dropout=0.0))


@pytest.fixture(scope="module")
def students(models) -> dict[str, Student]:
    return {name: loaded(folder) for name, folder in models.items()}


def options_for(model: Path, output: Path, **changes) -> LoraOptions:
    given = {
        "grid": GRID,
        "sizes": LoraSizes(rank=4, alpha=8, dropout=0.1),
        "steps": 6,
        "photos_per_step": 2,
        "learning_rate": 1e-2,
        "projector_rate": 1e-3,
        "mix": MIX,
        "precision": "float32",
        "device": "cpu",
        "checkpoint_every": 3,
    }
    return LoraOptions(str(model), output, **{**given, **changes})


# ---------------------------------------------------------------- what is fed


@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_has_the_tokens_that_the_server_renders(students, photos, name):
    student = students[name]
    question = class_question("square")
    square = student.family.squash(photos[0].open())
    content = [{"type": "image", "image": square}, {"type": "text", "text": question}]
    rendered = student.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=student.family.conversation.chat_template(),  # as the server does
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    asked = student.speaker.asked(ask(photos[0])[0])
    assert student.speaker.prompt_ids(question) == list(rendered)
    assert list(asked.ids[: asked.num_prompt]) == student.speaker.prompt_ids(ask(photos[0])[0].prompt)
    assert rendered.count(student.speaker.image_token_id) == student.family.num_image_tokens


@pytest.mark.parametrize("name", MAKERS)
def test_cached_features_are_the_pictures_own_in_their_order(students, photos, name):
    student = students[name]
    image = photos[0].open()
    with torch.no_grad():
        expected_TD = torch.cat([*student._image_features(image)])
        given_TD = student.projected(student.stored_features(image))
    assert expected_TD.std(dim=0).mean() > 0.01, "a picture without differences shows no order"
    torch.testing.assert_close(given_TD, expected_TD.reshape(given_TD.shape), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_packed_questions_give_what_each_gives_alone_in_the_models_own_forward(students, photos, name):
    """The reference is the class itself on pixels: no packing, no cache, no embeddings of ours."""
    student = students[name]
    asked = [student.speaker.asked(question) for question in ask(photos[0])]
    assert len(asked) >= 3
    (sequence,) = packed(asked, student.positions, most_tokens=4096)
    assert len(sequence.ids_S) < 0.7 * sum(len(question.ids) for question in asked)
    image = photos[0].open()
    pixels = student.processor.image_processor(
        images=[student.family.squash(image)],
        return_tensors="pt",
        **student.speaker.image_kwargs.get("images_kwargs", {}),
    )
    pixels.pop("num_patches", None)
    alone = []
    with torch.no_grad():
        packed_AV = student.logits(sequence, student.projected(student.stored_features(image)))
        for question in asked:
            ids = torch.tensor([question.ids])
            kinds = {"mm_token_type_ids": (ids == student.speaker.image_token_id).int()} if name == "qwen2-vl" else {}
            logits_SV = student.model(input_ids=ids, **pixels, **kinds).logits[0]
            alone.append(logits_SV[question.num_prompt - 1 : -1])
    torch.testing.assert_close(packed_AV, torch.cat(alone), atol=2e-2, rtol=5e-3)
    assert packed_AV.std() > 0.3, "logits without differences show nothing"


def test_a_sequence_that_would_be_too_long_is_several(students, photos):
    student = students["llava"]
    asked = [student.speaker.asked(question) for question in ask(photos[0])]
    sequences = [*packed(asked, student.positions, most_tokens=len(asked[0].ids) + 1)]
    assert len(sequences) == len(asked)
    together = torch.cat([sequence.target_A for sequence in sequences])
    (whole,) = packed(asked, student.positions, most_tokens=10_000)
    assert together.equal(whole.target_A)


@pytest.mark.parametrize("name", MAKERS)
def test_only_answers_are_learnt_to_their_end(students, photos, name):
    student = students[name]
    (question, *_) = ask(photos[0])
    asked = student.speaker.asked(question)
    (sequence,) = packed([asked], student.positions, most_tokens=4096)
    text = student.speaker.tokenizer.decode(sequence.target_A)
    end = student.speaker.tokenizer.decode(student.speaker.end_ids)
    assert text.strip() == f"{question.answer}{end}"
    assert len(student.speaker.end_ids) == 1
    assert sequence.ids_S[sequence.source_A[1:]].equal(sequence.target_A[:-1]), "each predicts its next"
    assert sequence.ids_S[sequence.source_A[0]] == asked.ids[asked.num_prompt - 1]


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_that_is_unknown_is_learnt(students, photos, name):
    student = students[name]
    unsure = replace(photos[0], unsure=("circle",), absent=())
    questions = questions_of(unsure, GRID, np.random.default_rng(0), QuestionMix(everything_share=1, max_ignored=1))
    (question,) = [question for question in questions if question.kind == "everything"]
    spans = ignored_spans(question)
    assert spans
    asked = student.speaker.asked(question)
    learnt = [token for token, is_learnt in zip(asked.ids, asked.is_learnt, strict=True) if is_learnt]
    kept = "".join(
        character
        for place, character in enumerate(question.answer)
        if not any(start <= place < end for start, end in spans)
    )
    said = student.speaker.tokenizer.decode(learnt).removesuffix(
        student.speaker.tokenizer.decode(student.speaker.end_ids)
    )
    # a token may hold a known and an unknown character, and is not learnt then
    assert len(said) >= 0.8 * len(kept)
    assert "others" not in said.partition("<seg>")[2]
    assert said.count("square") == kept.count("square") > 0


def ask(photo: Photo) -> list:
    return questions_of(photo, GRID, np.random.default_rng(1), MIX)


# ---------------------------------------------------------------- what is learnt


@pytest.fixture(scope="module")
def overfitted(models, photos, tmp_path_factory) -> dict[str, Path]:
    """A LLaVA with its projector and a Qwen2-VL without, until they know two pictures by heart; an InternVL, begun."""
    folder = tmp_path_factory.mktemp("runs")
    mix = QuestionMix(num_absent=0, multi_class_share=0, everything_share=0, varies_templates=False)
    runs = {}
    for name, trains_projector, steps in (("llava", True, 40), ("qwen2-vl", False, 40), ("internvl", True, 4)):
        sizes = LoraSizes(rank=16, alpha=32, dropout=0.0, trains_projector=trains_projector)
        options = options_for(models[name], folder / name, sizes=sizes, steps=steps, mix=mix, checkpoint_every=40)
        runs[name] = train_lora(options, photos)
    return runs


def reopened(adapter: Path, base: Path) -> torch.nn.Module:
    """As anybody would: PEFT's own loading of its own files."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    return PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter).eval()


def inputs_of(student: Student, photo: Photo, question: str) -> dict:
    square = student.family.squash(photo.open())
    return dict(
        student.processor(
            images=[square],
            text=[student.speaker.prompt(question)],
            add_special_tokens=False,
            return_tensors="pt",
            **student.speaker.image_kwargs,
        )
    )


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_answers_of_an_overfitted_model_are_the_truth(overfitted, models, students, photos, name):
    adapter = overfitted[name]
    losses = losses_of(adapter)
    assert len(losses) == 40
    assert losses[-1] < 0.1 * losses[0]
    student = students[name]
    model = reopened(adapter, models[name])
    for photo in photos:
        label = photo.instances[0].label
        given = inputs_of(student, photo, class_question(label))
        made = model.generate(**given, max_new_tokens=120, do_sample=False, eos_token_id=student.speaker.end_ids)
        text = student.speaker.tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        (descriptor,) = decode_answer(text, height=GRID, width=GRID, labels=["others", label]).descriptors
        assert descriptor.status is DescriptorStatus.COMPLETE
        (truth,) = [
            question
            for question in questions_of(photo, GRID, np.random.default_rng(0), QuestionMix(0, 0, 0, 0))
            if question.kind == "class"
        ]
        assert np.array_equal(descriptor.mask(label), truth.cells_GG.astype(bool))
        assert truth.cells_GG.any()


def losses_of(adapter: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (adapter.parent / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_bfloat16_and_recomputed_activations_learn_the_same(models, photos, tmp_path, name):
    """What is frozen is rounded, what is trained is not; a recomputed activation is the same, dropout included."""
    options = options_for(models[name], tmp_path / "plain", steps=3)
    plain = losses_of(train_lora(options, photos))
    recomputed = losses_of(
        train_lora(replace(options, output=tmp_path / "recomputed", checkpoints_activations=True), photos)
    )
    rounded = train_lora(replace(options, output=tmp_path / "rounded", precision="bfloat16"), photos)
    assert recomputed == pytest.approx(plain, rel=1e-5)
    assert losses_of(rounded) == pytest.approx(plain, rel=0.05)
    assert losses_of(rounded) != plain
    assert {weight.dtype for weight in load_file(rounded / "adapter_model.safetensors").values()} == {torch.float32}


# ---------------------------------------------------------------- what is served


@pytest.mark.parametrize("name", MAKERS)
def test_a_merged_model_is_the_adapted_one(overfitted, models, students, photos, tmp_path, name):
    from transformers import AutoModelForImageTextToText

    merged = merge_adapter(overfitted[name], tmp_path / "merged")
    given = inputs_of(students[name], photos[1], class_question("circle"))
    with torch.no_grad():
        plain = AutoModelForImageTextToText.from_pretrained(models[name])(**given).logits
        adapted = reopened(overfitted[name], models[name])(**given).logits
        made = AutoModelForImageTextToText.from_pretrained(merged)(**given).logits
    torch.testing.assert_close(made, adapted, atol=1e-3, rtol=1e-3)
    assert (adapted - plain).abs().max() > 0.1, "the adapter changes nothing"
    config = json.loads((merged / "config.json").read_text())
    assert config["text4seg"] == {"grid": GRID, "style": "plain"}
    assert family_of(config).grid == GRID


def test_convert_merges_a_llava_the_same_way(overfitted, students, photos, tmp_path):
    from transformers import AutoModelForImageTextToText

    from relay_models.text4seg.convert import convert

    made = convert(overfitted["llava"], tmp_path / "converted")
    assert made.grid == GRID
    assert made.style is Style.PLAIN
    merged = merge_adapter(overfitted["llava"], tmp_path / "merged")
    given = inputs_of(students["llava"], photos[0], class_question("square"))
    with torch.no_grad():
        first, second = (
            AutoModelForImageTextToText.from_pretrained(folder)(**given).logits for folder in (made.folder, merged)
        )
    vocabulary = min(first.shape[-1], second.shape[-1])
    torch.testing.assert_close(first[..., :vocabulary], second[..., :vocabulary], atol=1e-4, rtol=1e-4)


def test_the_served_form_says_what_has_to_be_merged(overfitted, models):
    llava, qwen = served_form(overfitted["llava"]), served_form(overfitted["qwen2-vl"], "mine")
    assert "multi_modal_projector" in llava.merge_reason
    assert llava.flags == ()
    assert qwen.merge_reason is None
    assert qwen.base == str(models["qwen2-vl"])
    assert qwen.flags == (
        *("--enable-lora", "--max-lora-rank", "16", "--lora-modules", f"mine={overfitted['qwen2-vl']}"),
        *("--relay-segmentation", str(GRID)),
    )
    assert "--lora-modules adapter=" in (overfitted["qwen2-vl"] / "README.md").read_text()


def test_vllm_takes_the_adapter_that_needs_no_merge_and_not_the_other(overfitted):
    peft_helper = pytest.importorskip("vllm.lora.peft_helper")
    from vllm.config.lora import LoRAConfig

    def check(adapter: Path) -> None:
        helper = peft_helper.PEFTHelper.from_local_dir(str(adapter), max_position_embeddings=4096)
        helper.validate_legal(LoRAConfig(max_lora_rank=16))

    check(overfitted["qwen2-vl"])
    with pytest.raises(ValueError, match="modules_to_save"):
        check(overfitted["llava"])


def test_merging_refuses_what_is_not_the_base(overfitted, models, tmp_path):
    with pytest.raises(CheckpointError, match="changes nothing that its base has"):
        merge_adapter(overfitted["llava"], tmp_path / "merged", base=models["qwen2-vl"])
    assert not (tmp_path / "merged").exists()
    assert not [*tmp_path.iterdir()]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        merge_adapter(overfitted["llava"], tmp_path / "full")


# ---------------------------------------------------------------- killed and gone on with


def test_a_run_that_was_killed_gives_the_same_bits(models, photos, tmp_path):
    options = options_for(models["llava"], tmp_path / "whole", variants=2, augmentation=Augmentation(mosaic=0))
    whole = train_lora(options, photos)

    class Killed(BaseException):
        pass

    def kill(step: int, loss: float) -> None:
        if step == 5:  # two steps after the checkpoint
            raise Killed

    halves = replace(options, output=tmp_path / "halves")
    with pytest.raises(Killed):
        train_lora(halves, photos, kill)
    assert not (tmp_path / "halves/adapter").exists()
    steps: list[int] = []
    resumed = train_lora(halves, photos, lambda step, loss: steps.append(step))
    assert steps == [4, 5, 6]
    name = "adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (folder.parent / "log.jsonl").read_text().splitlines()]
        for folder in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_lora_training import options_for
from relay_models.recipes.text4seg.dataset import load_png_masks
from relay_models.recipes.text4seg.lora_training import train_lora
options = options_for({model!r}, {output!r})
train_lora(options, load_png_masks({data!r}), lambda step, loss: step < 5 or os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.slow
def test_a_process_that_was_killed_gives_the_same_bits(models, photos, tmp_path):
    data, output = tmp_path / "data", tmp_path / "halves"
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True)
    for index, photo in enumerate(photos):
        photo.open().save(data / f"images/{index}.png")
        instance = photo.instances[0]
        Image.fromarray(instance.mask_HW.astype(np.uint8) * 255).save(data / f"masks/{index}.{instance.label}.0.png")
    code = KILLED.format(
        tests=str(Path(__file__).parent), model=str(models["llava"]), output=str(output), data=str(data)
    )
    killed = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    known = load_png_masks(data)
    whole = train_lora(options_for(models["llava"], tmp_path / "whole"), known)
    steps: list[int] = []
    resumed = train_lora(options_for(models["llava"], output), known, lambda step, loss: steps.append(step))
    assert steps == [4, 5, 6]
    assert (resumed / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"precision": "int4"}, "precision must be one of bfloat16, float32, got 'int4'"),
        ({"warmup_share": 1.0}, "warmup_share must be at least 0 and below 1"),
        ({"seed": -1}, "seed must not be negative, got -1"),
    ],
)
def test_an_impossible_option_is_named(tmp_path, change, message):
    with pytest.raises(RelayModelsError, match=message):
        options_for(tmp_path, tmp_path, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rank": 0}, "rank must be a whole number"), ({"dropout": 1.0}, "dropout must be at least")],
)
def test_an_impossible_size_is_named(change, message):
    with pytest.raises(RelayModelsError, match=message):
        LoraSizes(**change)


def test_a_checkpoint_of_another_run_is_not_gone_on_with(models, photos, tmp_path):
    options = options_for(models["llava"], tmp_path, steps=1, photos_per_step=1)
    train_lora(options, photos[:1])
    with pytest.raises(RelayModelsError, match="was made with seed 0, and now it is 1"):
        train_lora(replace(options, seed=1), photos[:1])
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(RelayModelsError, match=r"checkpoint.pt cannot be read"):
        train_lora(options, photos[:1])


def test_a_cache_that_does_not_fit_the_disk_is_refused_beforehand(models, photos, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(RelayModelsError, match="has 1 MiB free, and the cached features take"):
        train_lora(options_for(models["llava"], tmp_path), photos)
    assert not (tmp_path / "features").exists()


def test_photos_without_anything_to_ask_are_refused(models, photos, tmp_path):
    empty = [replace(photo, instances=(), absent=()) for photo in photos]
    with pytest.raises(RelayModelsError, match="photos give no question at all"):
        train_lora(options_for(models["llava"], tmp_path), empty)


def test_a_label_that_the_model_does_not_read_as_text_is_refused_beforehand(models, photos, tmp_path):
    odd = [replace(photos[0], absent=("a <image> of a cat",))]
    with pytest.raises(LabelError, match=r"the label 'a <image> of a cat' of 0.png holds '<image>'"):
        train_lora(options_for(models["llava"], tmp_path), odd)


def test_a_model_of_no_family_here_is_refused(tmp_path):
    for architecture, message in (
        ("DeepseekVLV2ForCausalLM", "this recipe does not train"),
        ("InternVLChatModel", "name its twin ending in -hf"),
        ("LlamaForCausalLM", "of no segmentation family"),
    ):
        config = {"architectures": [architecture], "model_type": "deepseek_vl_v2"}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            trained_config(tmp_path, "some-model", None, None)


def test_without_peft_the_error_says_how_to_have_it(models, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RelayModelsError, match=r"pip install 'vllm-relay\[train\]'"):
        train_lora(options_for(models["llava"], tmp_path), photos)


def test_the_rate_rises_then_falls_to_almost_nothing():
    options = LoraOptions("model", Path(), steps=100, warmup_share=0.1)
    shares = [options.rate_share(step) for step in range(100)]
    assert max(shares) == shares[10] == 1
    assert shares[:11] == sorted(shares[:11])
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0 < shares[-1] < 0.001
    assert shares[0] == pytest.approx(1 / 11)
