"""relay-seg in vLLM says what its Hugging Face module says, and questions about one picture share it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import LlamaForCausalLM

from relay_models.relay_seg.configuration import IMAGE_TOKEN_ID
from relay_models.relay_seg.processing import RelaySegProcessor
from relay_models.text4seg.families.relay_seg import CONVERSATION
from relay_models.text4seg.prompts import Subject, question

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from tiny_relay_seg import make_tiny_relay_seg  # noqa: E402

SEG_TINY = HERE.parents[3] / "shared/data/seg-tiny"
ROTATED, TRANSPARENT = 1, 2  # of the pictures below
TOLERANCE = 1e-3
BLOCK = 32  # tokens of KV cache; the server's default for models that segment


def questions(*expressions: str) -> list[str]:
    return [question(Subject.refer(expression)) for expression in expressions]


def jpeg(image: Image.Image, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def half_transparent(image: Image.Image) -> Image.Image:
    """The same with nothing to be seen in its left half, whose hidden colour is black."""
    alpha = np.full((image.height, image.width), 255, dtype=np.uint8)
    alpha[:, : image.width // 2] = 0
    hidden = np.array(image) * (alpha[..., None] > 0)
    return Image.fromarray(np.dstack([hidden, alpha]).astype(np.uint8), "RGBA")


def as_seen(data: bytes) -> Image.Image:
    """Upright, on white: by Pillow's own means, not by ours."""
    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened)
    if upright.mode != "RGBA":
        return upright.convert("RGB")
    white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, upright).convert("RGB")


def run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What the driver found, in an engine of its own with relay's plugin."""
    job_file, result_file = folder / "job.json", folder / "result.pt"
    job_file.write_text(json.dumps(job))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TRITON_"))}
    caches = {name: value for name, value in os.environ.items() if name in ("VLLM_RELAY_CACHE", "VLLM_CACHE_ROOT")}
    variables = {**kept, **caches, "VLLM_PLUGINS": "relay", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, str(HERE / "relay_seg_driver.py"), str(job_file), str(result_file)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return dict(torch.load(result_file))


def written(folder: Path, pictures: list[bytes]) -> list[str]:
    files = [folder / f"picture-{number}" for number in range(len(pictures))]
    for file, data in zip(files, pictures, strict=True):
        file.write_bytes(data)
    return [str(file) for file in files]


def load_module(folder: Path) -> Any:
    from relay_models.relay_seg.modeling import RelaySegForConditionalGeneration

    return RelaySegForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def check_logits(module: Any, processor: RelaySegProcessor, image: Image.Image, asked: str, answer: dict) -> float:
    """The largest difference of a logit, given what vLLM said; and that prompt and choices are the same."""
    inputs = processor(CONVERSATION.prompt(asked), [image])
    assert inputs["input_ids"][0].tolist() == answer["prompt"]
    said = torch.tensor([answer["prompt"] + answer["tokens"]])
    with torch.no_grad():
        logits_SV = module(input_ids=said, pixel_values=inputs["pixel_values"]).logits[0]
    expected_SV = logits_SV[len(answer["prompt"]) - 1 : -1]
    assert expected_SV.argmax(-1).tolist() == answer["tokens"]
    return float((expected_SV - answer["logits_SV"]).abs().max())


# ---------------------------------------------------------------- a tiny model


@pytest.fixture(scope="module")
def tiny(embedded_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_relay_seg(tmp_path_factory.mktemp("relay_seg") / "tiny", embedded_model)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    """A plain picture, one that lies on its side, one half of which is transparent."""
    rng = np.random.default_rng(0)
    blocks = [Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((96, 64), 0) for _ in range(3)]
    return [jpeg(blocks[0]), jpeg(blocks[1], orientation=6), png(half_transparent(blocks[2]))]


PLAIN = "One day a little fox went to the river, because it had heard of the fish that live there, and " * 3
QUESTIONS = questions("the dog", "a red car, number 5", "person", "zebra")


@pytest.fixture(scope="module")
def answered(tiny: Path, pictures: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One question about each picture, alone; then three more about the first, together; then texts beside one."""
    folder = tmp_path_factory.mktemp("answered")
    requests = [[[number, QUESTIONS[0]]] for number in range(3)]
    requests.append([[0, asked] for asked in QUESTIONS[1:]])
    requests.append([[None, PLAIN], [0, QUESTIONS[0]], [None, PLAIN + " <image> What then?"]])
    job = {
        "model": str(tiny),
        "pictures": written(folder, pictures),
        "batches": [{"requests": batch, "max_tokens": 4, "logits": True} for batch in requests],
        "engine": {"dtype": "float32"},
        "refused_options": {"size": 224},
    }
    return run(folder, job)


def test_logits_are_those_of_the_hugging_face_module(tiny, pictures, answered):
    module, processor = load_module(tiny), RelaySegProcessor.from_pretrained(tiny)
    for number, data in enumerate(pictures):
        (answer,) = answered["batches"][number]
        assert check_logits(module, processor, as_seen(data), QUESTIONS[0], answer) < TOLERANCE
    for asked, answer in zip(QUESTIONS[1:], answered["batches"][3], strict=True):
        assert check_logits(module, processor, as_seen(pictures[0]), asked, answer) < TOLERANCE


@pytest.mark.parametrize("number", [ROTATED, TRANSPARENT])
def test_a_picture_seen_differently_would_be_noticed(tiny, pictures, answered, number):
    """What the first test says of turned and transparent pictures is not true of them as stored."""
    module, processor = load_module(tiny), RelaySegProcessor.from_pretrained(tiny)
    with Image.open(io.BytesIO(pictures[number])) as opened:
        as_stored = Image.fromarray(np.asarray(opened)[..., :3])
    (answer,) = answered["batches"][number]
    inputs = processor(CONVERSATION.prompt(QUESTIONS[0]), [as_stored])
    with torch.no_grad():
        logits_V = module(**inputs).logits[0, -1]
    assert (logits_V - answer["logits_SV"][0]).abs().max() > 10 * TOLERANCE


def test_questions_about_one_picture_share_all_of_it(answered):
    """All full blocks of what stands before the question are found again; of another picture, none is."""
    first, *others = (batch[0] for batch in answered["batches"][:3])
    cells = [place for place, token in enumerate(first["prompt"]) if token == IMAGE_TOKEN_ID]
    assert cells == list(range(cells[0], cells[0] + 256))
    assert [answer["cached"] for answer in (first, *others)] == [0, 0, 0]
    full_blocks = (cells[-1] + 1) // BLOCK * BLOCK
    assert full_blocks >= 256
    assert [answer["cached"] for answer in answered["batches"][3]] == [full_blocks] * 3
    (counters,) = answered["counters"]
    assert counters["relay_steps"] > 0
    assert counters["grouped_requests"] >= 3


def test_texts_beside_a_picture_are_answered_by_the_base(tiny, pictures, answered):
    """In steps of both kinds, the change to the language model acts on the question about the picture alone."""
    module, processor = load_module(tiny), RelaySegProcessor.from_pretrained(tiny)
    first, about_picture, second = answered["batches"][-1]
    assert check_logits(module, processor, as_seen(pictures[0]), QUESTIONS[0], about_picture) < TOLERANCE
    base = plain_llama(module)
    for answer in (first, second):
        said = torch.tensor([answer["prompt"] + answer["tokens"]])
        with torch.no_grad():
            expected_SV = base(input_ids=said).logits[0, len(answer["prompt"]) - 1 : -1]
        assert (expected_SV - answer["logits_SV"]).abs().max() < TOLERANCE


def plain_llama(module: Any) -> LlamaForCausalLM:
    """The language model of a relay-seg module, without the change."""
    base = LlamaForCausalLM(module.config.text_config).eval()
    base.load_state_dict({name: t for name, t in module.language_model.state_dict().items() if ".lora_" not in name})
    return base


def test_options_of_a_picture_are_refused(answered):
    assert "this model's pictures have no options, got {'size': 224}" in answered["refusal"]


# ---------------------------------------------------------------- relay-seg-tiny itself

CHATS = (
    "Finish the list: Monday, Tuesday, Wednesday,",
    "Why is the sky blue? Answer in one sentence.",
    "Write the plural of: one mouse, two",
)
MOST_TOKENS = 400  # of an answer; few descriptors are longer


@pytest.fixture(scope="module")
def relay_seg_tiny() -> Path:
    from relay_serving import embedded_model

    return embedded_model.prepare(embedded_model.RELAY_SEG)


@pytest.fixture(scope="module")
def photos() -> list[tuple[bytes, str]]:
    """Twenty of the validation photos, each with a thing that is in it; some turned, some half transparent."""
    if not SEG_TINY.is_dir():
        pytest.skip("needs ../shared/data/seg-tiny")
    records = [json.loads(line) for line in (SEG_TINY / "val.jsonl").read_text().splitlines()]
    chosen = [record for record in records if record["instances"]][::5][:20]
    assert len(chosen) == 20
    found = []
    for number, record in enumerate(chosen):
        image = Image.open(SEG_TINY / "images" / Path(record["file"]).name).convert("RGB")
        largest = max(record["instances"], key=lambda instance: box_area(instance["box"]))
        if number < 6:
            data = jpeg(image, orientation=3 + number)
        elif number < 10:
            data = png(half_transparent(image))
        else:
            data = (SEG_TINY / "images" / Path(record["file"]).name).read_bytes()
        found.append((data, largest["label"]))
    return found


def box_area(box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


@pytest.mark.slow
def test_twenty_photos_get_the_logits_and_the_descriptors_of_the_module(relay_seg_tiny, photos, tmp_path):
    """In float32. Logits of the first answer tokens; descriptors to their end."""
    asked = [question(Subject.refer(label)) for _, label in photos]
    module, processor = load_module(relay_seg_tiny), RelaySegProcessor.from_pretrained(relay_seg_tiny)
    requests = [[number, words] for number, words in enumerate(asked)]
    job = {
        "model": str(relay_seg_tiny),
        "pictures": written(tmp_path, [data for data, _ in photos]),
        "batches": [
            {"requests": requests, "max_tokens": 2, "logits": True},
            {"requests": requests, "max_tokens": MOST_TOKENS, "logits": False},
        ],
        "engine": {"dtype": "float32"},
        "chats": [[{"role": "user", "content": text}] for text in CHATS],
    }
    found = run(tmp_path, job)
    first_answers, whole_answers = found["batches"]
    worst = 0.0
    for (data, _), words, first, answer in zip(photos, asked, first_answers, whole_answers, strict=True):
        image = as_seen(data)
        worst = max(worst, check_logits(module, processor, image, words, first))
        inputs = processor(CONVERSATION.prompt(words), [image])
        spoken = module.generate(**inputs, max_new_tokens=MOST_TOKENS, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        assert processor.tokenizer.decode(spoken, skip_special_tokens=True) == answer["text"]
    print(f"largest difference of a logit: {worst:.1e}")
    assert worst < TOLERANCE
    assert sum("<seg>" in answer["text"] for answer in whole_answers) >= 10
    for text, chat in zip(CHATS, found["chats"], strict=True):
        prompt = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert prompt["input_ids"][0].tolist() == chat["prompt"]
        spoken = module.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert spoken.tolist() == chat["tokens"]
