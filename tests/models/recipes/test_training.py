"""The training of relay-seg-tiny: what is packed, computed, learnt and written, against doing it plainly."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from relay_models.errors import CheckpointError, RelayModelsError
from relay_models.recipes.text4seg import warmup
from relay_models.recipes.text4seg.cells import CellTargets, cell_targets
from relay_models.recipes.text4seg.dataset import Instance, Photo
from relay_models.recipes.text4seg.features import Variant
from relay_models.recipes.text4seg.lora_layers import Guide, LoraLlama, PackedLayout, _Group
from relay_models.recipes.text4seg.packing import (
    CHANGE_WEIGHT,
    DISTRACTED_WEIGHT,
    KNOWN_WEIGHT,
    MARK_WEIGHT,
    PREAMBLE_WEIGHT,
    Packer,
)
from relay_models.recipes.text4seg.questions import Question, QuestionMix, questions_of
from relay_models.recipes.text4seg.training import (
    Data,
    Drawn,
    Model,
    TrainingOptions,
    _Topics,
    _Trainer,
    export,
    load_trained,
)
from relay_models.recipes.text4seg.warmup import WarmupOptions, cell_losses, presence_loss, warm_up
from relay_models.relay_seg.activated_lora import add_lora
from relay_models.relay_seg.assemble import read_trained, save_trained
from relay_models.relay_seg.configuration import IMAGE_TOKEN_ID
from relay_models.relay_seg.projector import Projector, ProjectorSizes, row_runs
from relay_models.text4seg.families.relay_seg import CONVERSATION, IMAGE_TOKEN
from relay_models.text4seg.row_marks import ROW_MARKS

GRID = 4
CLASSES = ("circle", "square")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from relay_serving import embedded_model

    folder = embedded_model.folder()
    if not embedded_model.is_ready(folder):
        pytest.skip("SmolLM2 was not prepared here: vllm-relay prepare")
    return AutoTokenizer.from_pretrained(folder)


def tiny_config(vocabulary: int = 128) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )


def tiny_llama(config: LlamaConfig, *, alpha: float = 6.0) -> tuple[LlamaForCausalLM, LoraLlama]:
    """The same model twice: by Hugging Face with the change merged, and ours. All halves are large."""
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.3)
    ours = LoraLlama(config, plain.state_dict(), rank=3, alpha=alpha, seed=0, dtype=torch.float32)
    halves = ours.named_halves()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for half in halves.values():
            half.normal_(std=0.2)
        for name in halves:
            if name.endswith("lora_A.weight"):
                up = halves[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("language_model.").replace("lora_A.weight", "weight")
                weights[target] += alpha / 3 * up @ halves[name]
    ours.merge()
    return plain, ours


# ---------------------------------------------------------------- the packed Llama


@pytest.mark.parametrize("lengths", [(5,), (3, 9, 1, 7), ()])
def test_a_packed_question_is_what_it_is_alone(lengths: tuple[int, ...]) -> None:
    plain, ours = tiny_llama(tiny_config())
    prefix = 6
    ids = torch.randint(0, 128, (prefix + sum(lengths),))
    with torch.no_grad():
        hidden = ours(F.embedding(ids, ours.embeddings), PackedLayout(prefix, lengths))
        start = prefix
        torch.testing.assert_close(hidden[:prefix], plain.model(ids[None, :prefix]).last_hidden_state[0])
        for length in lengths:
            alone = torch.cat((ids[:prefix], ids[start : start + length]))[None]
            expected = plain.model(alone).last_hidden_state[0, prefix:]
            torch.testing.assert_close(hidden[start : start + length], expected, rtol=1e-4, atol=1e-4)
            start += length


def test_tokens_before_the_picture_are_computed_as_the_base_computes_them() -> None:
    config, unchanged = tiny_config(), 4
    torch.manual_seed(1)
    module = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    ours = LoraLlama(config, module.state_dict(), rank=3, alpha=6.0, seed=0, dtype=torch.float32)
    activation = add_lora(module.model.layers, 3, 6.0)
    weights = dict(module.named_parameters())
    halves = ours.named_halves()
    with torch.no_grad():
        for name, half in halves.items():
            half.normal_(std=0.2)
            weights[name.removeprefix("language_model.")].copy_(half)
    ours.merge()
    ids = torch.randint(0, 128, (11,))
    wanted = torch.randn(11, config.hidden_size)
    activation.follows_NS1 = (torch.arange(11) >= unchanged).float()[None, :, None]
    expected = module.model(ids[None]).last_hidden_state[0]
    found = ours(F.embedding(ids, ours.embeddings), PackedLayout(6, (5,), unchanged))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (expected * wanted).sum().backward()
    (found * wanted).sum().backward()
    for name, half in halves.items():
        torch.testing.assert_close(half.grad, weights[name.removeprefix("language_model.")].grad, rtol=1e-3, atol=1e-3)


def test_the_halves_get_the_gradient_that_the_whole_would_give_them() -> None:
    generator = torch.Generator().manual_seed(0)
    bases = [torch.randn(rows, 7, generator=generator, dtype=torch.float64) for rows in (5, 3)]
    group = _Group(bases, 2, 1.7, generator)
    for up in group.ups:
        torch.nn.init.normal_(up)
    group.merge()
    x = torch.randn(11, 7, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(11, 8, dtype=torch.float64)
    (group(x, 0) * wanted).sum().backward()
    found = [x.grad, *(parameter.grad for parameter in group.parameters())]
    again = x.detach().clone().requires_grad_(True)
    copies = [parameter.detach().double().requires_grad_(True) for parameter in group.parameters()]
    downs, ups = copies[:2], copies[2:]
    merged = torch.cat([base + 1.7 * up @ down for base, down, up in zip(bases, downs, ups, strict=True)])
    ((again @ merged.T) * wanted).sum().backward()
    for one, other in zip(found, [again.grad, *(copy.grad for copy in copies)], strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_guide_measures_the_attention_it_names() -> None:
    config = tiny_config()
    _, ours = tiny_llama(config)
    layout = PackedLayout(6, (3, 9))
    ids = torch.randint(0, 128, (18,))
    embeddings = F.embedding(ids, ours.embeddings)
    # The last token of the second question looks at token 2 with one head, and at tokens 0 and 4 with another.
    wanted = tuple(torch.zeros(1, 6, dtype=torch.bool) for _ in range(2))
    wanted[0][0, 2] = wanted[1][0, 0] = wanted[1][0, 4] = True
    guide = Guide(torch.tensor([17]), wanted, (1,), ((0, 1), (2, 0)), (1,))
    with torch.no_grad():
        hidden, shares, probed = ours.guided(embeddings, layout, guide)
        torch.testing.assert_close(hidden, ours(embeddings, layout))
        plain, _ = tiny_llama(config)
        plain.set_attn_implementation("eager")
        alone = torch.cat((ids[:6], ids[9:]))[None]
        outputs = plain.model(alone, output_attentions=True, output_hidden_states=True)
    attention = outputs.attentions[1][0, :, -1]
    assert shares.shape == (1, 1, 2)
    expected = torch.stack((attention[1, 2], attention[4, 0] + attention[4, 4]))
    torch.testing.assert_close(shares[0, 0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(probed[0][0], outputs.hidden_states[2][0, -1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        _, _, stopped = ours.guided(embeddings, layout, replace(guide, layers=(), heads=(), wanted_M=(), stop=1))
    torch.testing.assert_close(stopped[0], probed[0])


# ---------------------------------------------------------------- packing


def a_photo(file: str = "a.png", *, unsure: tuple[str, ...] = ()) -> Photo:
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 4:] = True
    return Photo(file, 8, 8, (Instance.of(0, "square", mask),), absent=("circle",), unsure=unsure)


def the_question(photo: Photo, kind: str = "class") -> Question:
    mix = QuestionMix(varies_templates=False, multi_class_share=0, everything_share=0, absent_expression_share=0)
    return next(item for item in questions_of(photo, GRID, np.random.default_rng(0), mix) if item.kind == kind)


def test_the_tokens_are_those_of_the_servers_prompt_and_the_answer(tokenizer) -> None:
    packer = Packer(tokenizer, GRID**2)
    question = the_question(a_photo())
    packed = packer.pack([packer.exchange(question)])
    before, after = CONVERSATION.prompt(question.prompt).split(IMAGE_TOKEN)
    text = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    asked = [*text[0], *[IMAGE_TOKEN_ID] * GRID**2, *text[1]]
    assert packed.ids_S[: len(asked)].tolist() == asked
    assert packed.layout.unchanged == len(text[0])
    assert len(packed.ids_S) == len(asked) + len(packed.target_A)
    answer = tokenizer.decode(packed.target_A)
    assert answer == f"{question.answer}<|im_end|>"
    assert (packed.ids_S[packed.source_A + 1] == packed.target_A).all()


def test_a_token_knows_its_run_and_counts_as_much_as_the_picture_is_needed_for_it(tokenizer) -> None:
    packer = Packer(tokenizer, GRID**2)
    question = the_question(a_photo())
    assert question.answer.endswith("<seg>others *4\n others *2| square *2\n others *2| square *2\n others *4\n</seg>")
    exchange = packer.exchange(question)
    told = [
        (tokenizer.decode([token]), weight, run)
        for token, weight, run in zip(exchange.ids, exchange.weights, exchange.runs, strict=True)
    ]
    assert exchange.is_asked_GG.tolist() == (question.cells_GG == 1).tolist()
    start = next(place for place, (token, _, _) in enumerate(told) if token == "others")
    assert told[start : start + 12] == [
        ("others", KNOWN_WEIGHT, (0, 4, 0)),
        (" *", KNOWN_WEIGHT, (0, 4, 0)),
        ("4", KNOWN_WEIGHT, (0, 4, 0)),
        ("\n", KNOWN_WEIGHT, (3, 0, 0)),
        (" others", MARK_WEIGHT, (4, 2, 0)),
        (" *", KNOWN_WEIGHT, (4, 2, 0)),
        ("2", CHANGE_WEIGHT, (4, 2, 0)),
        ("|", 1.0, (5, 0, 0)),
        (" square", 1.0, (6, 2, 1)),
        (" *", 1.0, (6, 2, 1)),
        ("2", 1.0, (6, 2, 1)),
        ("\n", 1.0, (7, 0, 1)),
    ]
    # The third row is the second again, and says that it is the third.
    assert told[start + 12 : start + 14] == [(" ", MARK_WEIGHT, (8, 2, 0)), ("others", MARK_WEIGHT, (8, 2, 0))]
    assert {weight for _, weight, _ in told[start + 14 : start + 21]} == {KNOWN_WEIGHT}
    assert {weight for _, weight, _ in told[:start]} == {0.0, PREAMBLE_WEIGHT, 1.0}
    cut = packer.cut_after_row(exchange, 1)
    assert tokenizer.decode(cut.ids).endswith("<seg>others *4\n others *2| square *2\n")
    assert len(cut.ids) == len(cut.weights) == len(cut.runs)


def test_rows_that_show_something_else_count_more(tokenizer) -> None:
    packer = Packer(tokenizer, GRID**2)
    question = the_question(a_photo())
    exchange = packer.exchange(question)
    shows_GG = np.zeros((GRID, GRID), dtype=bool)
    shows_GG[0, 1] = shows_GG[1, 0] = True
    changed = exchange.distracted(shows_GG)
    assert (changed.ids, changed.runs) == (exchange.ids, exchange.runs)
    for before, after, (cell, *_) in zip(exchange.weights, changed.weights, exchange.runs, strict=True):
        is_told = 0 <= cell < 2 * GRID
        assert after == (DISTRACTED_WEIGHT if is_told and 0 < before < 1 else before)
    assert changed.weights.count(DISTRACTED_WEIGHT) == 4 + 2  # `others *4` and its end; ` others *`
    assert exchange.distracted(np.zeros_like(shows_GG)) == exchange


def test_rows_are_told_apart_by_tokens_and_not_by_text(tokenizer) -> None:
    packer = Packer(tokenizer, 256)
    assert len(set(ROW_MARKS)) == len(ROW_MARKS) == 15
    assert {tokenizer.decode(pieces) for pieces in packer.marks} == {" others"}
    mask = np.zeros((16, 16), dtype=bool)
    photo = replace(a_photo(), width=16, height=16, instances=(Instance.of(0, "square", ~mask),), absent=("circle",))
    mix = QuestionMix(num_absent=1, multi_class_share=0, everything_share=0)
    question = next(item for item in questions_of(photo, 16, np.random.default_rng(0), mix) if item.kind == "absent")
    ids = packer.exchange(question).ids
    assert tokenizer.decode(ids).endswith(f"{question.answer}<|im_end|>")
    starts = [place + 1 for place, token in enumerate(ids) if token == packer.line_break][3:-1]
    rows = [ids[start : start + len(pieces)] for start, pieces in zip(starts, packer.marks, strict=True)]
    assert rows == list(packer.marks)


def test_what_nobody_knows_does_not_count(tokenizer) -> None:
    packer = Packer(tokenizer, GRID**2)
    question = the_question(a_photo())
    ignore = np.zeros((GRID, GRID), dtype=bool)
    ignore[1, 2] = True
    exchange = packer.exchange(replace(question, ignore_GG=ignore))
    silent = [
        (tokenizer.decode([token]), run)
        for token, weight, run in zip(exchange.ids, exchange.weights, exchange.runs, strict=True)
        if weight == 0 and run[0] >= 0
    ]
    assert silent == [
        (" *", (4, 2, 0)),
        ("2", (4, 2, 0)),
        (" square", (6, 2, 1)),
        (" *", (6, 2, 1)),
        ("2", (6, 2, 1)),
    ]


# ---------------------------------------------------------------- targets of the projector


def test_cells_of_a_photo() -> None:
    targets = cell_targets(a_photo(unsure=("circle",)), GRID, CLASSES)
    class_GG = targets.class_T.reshape(GRID, GRID)
    assert class_GG.tolist() == [[0, 0, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 0, 0]]
    assert targets.unnamed_K.tolist() == [True, True, False]
    assert targets.is_object_T.tolist() == (class_GG == 2).reshape(-1).tolist()
    # From the cell at row 1, column 2, whose centre is (0.625, 0.375), to the object's centre (0.75, 0.5).
    assert targets.shape_T4[6].tolist() == [0.125, 0.125, 0.5, 0.5]


def test_no_class_that_may_lack_masks_is_punished() -> None:
    """Where a circle may be without a mask, saying circle costs nothing; where it may not, it does."""
    circle = torch.full((1, GRID**2, 3), -20.0)
    circle[..., 1] = 20.0
    shapes = torch.zeros(1, GRID**2, 4)

    def class_loss(targets: CellTargets) -> float:
        empty = replace(targets, class_T=np.zeros(GRID**2, dtype=np.int64))
        flat = cell_losses(torch.zeros(1, GRID**2, 3), shapes, [empty])
        return float(cell_losses(circle, shapes, [empty]) - flat)

    unsure = class_loss(cell_targets(a_photo(unsure=("circle",)), GRID, CLASSES))
    sure = class_loss(cell_targets(a_photo(), GRID, CLASSES))
    assert unsure == pytest.approx(-float(np.log(1.5)), abs=1e-4)
    assert sure == pytest.approx(40 - float(np.log(3)), abs=1e-3)


def test_what_is_there_and_what_is_surely_not() -> None:
    """People marked everything in the first photo. Of the others only what they say is absent is."""
    classes = (*CLASSES, "triangle", "star")
    by_hand = a_photo(unsure=("star",))
    (square,) = by_hand.instances
    pseudo = replace(by_hand, instances=(replace(square, is_pseudo=True),))
    squares_alone = replace(by_hand, labelled_classes=("square",))
    blank = replace(by_hand, instances=(), absent=("square", "star"))
    pasted_into = replace(by_hand, absent=("triangle",), marked_by_hand=False)
    speck = Instance.of(1, "circle", corner())
    vanished = cell_targets(replace(by_hand, instances=(square, speck)), GRID, classes)
    for photo, there, absent in (
        (by_hand, {"square"}, {"circle", "triangle"}),
        (pseudo, {"square"}, {"circle"}),
        (squares_alone, {"square"}, {"circle"}),
        (blank, set(), {"square"}),
        (pasted_into, {"square"}, {"triangle"}),
    ):
        targets = cell_targets(photo, GRID, classes)
        assert {classes[number - 1] for number in np.flatnonzero(targets.is_there_K)} == there
        assert {classes[number - 1] for number in np.flatnonzero(targets.is_absent_K)} == absent
    number = 1 + classes.index("circle")
    assert not vanished.is_there_K[number]
    assert not vanished.is_absent_K[number]


def corner() -> np.ndarray:
    """One pixel that is no cell's."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 0] = True
    return mask


def test_presence_is_that_of_the_likeliest_cell() -> None:
    targets = cell_targets(a_photo(), GRID, CLASSES)
    likely_NTK = torch.full((1, GRID**2, 3), 0.01)
    likely_NTK[0, :, 0] = 0.98
    likely_NTK[0, 3] = torch.tensor([0.3, 0.2, 0.5])
    expected = -np.log(0.5) - np.log(1 - 0.2)  # the square is there, the circle is absent
    assert float(presence_loss(likely_NTK.log(), [targets])) == pytest.approx(expected, abs=1e-5)
    unsure = cell_targets(a_photo(unsure=("circle",)), GRID, CLASSES)
    both = float(presence_loss(likely_NTK.log().expand(2, -1, -1), [targets, unsure]))
    assert both == pytest.approx(-np.log(0.5) - np.log(1 - 0.2) / 2, abs=1e-5)


# ---------------------------------------------------------------- steps


OPTIONS = TrainingOptions(
    minutes=1.0,
    reading_share=0.1,
    rank=2,
    alpha=4.0,
    tokens=300,
    processes=1,
    warmup_steps=1,
    lora_rate=1e-2,
)


def trainer(tokenizer, options: TrainingOptions = OPTIONS, classes: tuple[str, ...] = CLASSES) -> _Trainer:
    config = replace_layers(tiny_config(len(tokenizer)), 20)
    torch.manual_seed(0)
    tensors = {
        name: tensor * (6 if tensor.dim() > 1 else 1) for name, tensor in LlamaForCausalLM(config).state_dict().items()
    }
    llama = LoraLlama(config, tensors, rank=options.rank, alpha=options.alpha, seed=0, dtype=torch.float32)
    sizes = ProjectorSizes(
        channels=5,
        grid=GRID,
        width=16,
        num_layers=1,
        num_heads=2,
        num_classes=len(classes),
        out_width=config.hidden_size,
        present_above=0.2,
    )
    model = Model(Projector(sizes, dropout=0.1), torch.nn.Linear(16, 4), llama, classes)
    rng = np.random.default_rng(0)
    photos = tuple(a_photo(f"{number}.png") for number in range(3))
    features = rng.normal(size=(3, 5, GRID, GRID)).astype(np.float16)
    data = Data([Variant(photos, features)], np.full(3, 1 / 3))
    return _Trainer(options, model, data, tokenizer, 0)


def replace_layers(config: LlamaConfig, layers: int) -> LlamaConfig:
    """Deep enough for the guided layers."""
    config.num_hidden_layers = layers
    return config


def trained(made: _Trainer) -> dict[str, torch.Tensor]:
    halves = made.model.llama.named_halves()
    return {**halves, **made.model.projector.state_dict(), **made.probe.state_dict()}


def test_answers_are_cut_below_what_the_map_shows(tokenizer) -> None:
    made = trainer(tokenizer, replace(OPTIONS, whole_answers=0.0))
    question = the_question(a_photo(), "absent")

    def num_rows(last_shown: int) -> set[int]:
        map_GG = np.zeros((GRID, GRID), dtype=np.int64)
        map_GG[: last_shown + 1] = 2
        rng = np.random.default_rng(0)
        texts = [tokenizer.decode(made._exchange(question, map_GG, rng).ids) for _ in range(40)]
        return {text.partition("<seg>")[2].count("\n") for text in texts}

    assert num_rows(-1) == {1, 2, 3}
    assert num_rows(0) == {2, 3, 4}
    assert num_rows(2) == {4}


def test_an_answer_counts_more_where_the_map_shows_something_else(tokenizer) -> None:
    made = trainer(tokenizer, replace(OPTIONS, whole_answers=1.0))
    question = the_question(a_photo())
    map_GG = np.where(question.cells_GG > 0, 2, 0)
    map_GG[0, 3] = 1
    exchange = made._exchange(question, map_GG, np.random.default_rng(0))
    counted = zip(exchange.weights, exchange.runs, strict=True)
    assert {cell // GRID for weight, (cell, *_) in counted if weight == DISTRACTED_WEIGHT} == {0}


def test_an_expression_is_about_the_longest_name_it_holds_of_one_or_of_all() -> None:
    topics = _Topics(["person", "dog", "hot dog", "knife"])
    said = ("person", "all people", "the dogs", "the dog", "hot dogs", "a hot dog on a dog", "all knives", "hotdogs")
    assert [topics.of(text) for text in said] == [0, 0, 1, 1, 2, 2, 3, -1]


def test_heads_are_guided_to_what_tells_of_the_run(tokenizer) -> None:
    """Of a map whose second and third rows read `others *2| square *2`, and the last `circle *1| others *3`."""
    made = trainer(tokenizer, replace(OPTIONS, whole_answers=1.0))
    map_GG = np.zeros((GRID, GRID), dtype=np.int64)
    map_GG[1:3, 2:], map_GG[3, 0] = 2, 1
    first = len(made.packer.text_prefix)
    runs = row_runs(torch.from_numpy(map_GG).reshape(1, -1), GRID)

    def led(question: Question) -> dict[tuple[int, int], list[int]]:
        """Row and order to the places of the tokens that all heads are led to."""
        packed = made.packer.pack([made._exchange(question, map_GG, np.random.default_rng(0))])
        guide = made._guide(packed, runs, is_reading=True)
        of_run = packed.start_A >= 0
        assert guide.source_M.tolist() == packed.source_A[of_run].tolist()
        where = zip((packed.start_A[of_run] // GRID).tolist(), packed.order_A[of_run].tolist(), strict=True)
        found: dict[tuple[int, int], list[int]] = {}
        for place, *wanted_3P in zip(where, *guide.wanted_M, strict=True):
            looked = [wanted_P.nonzero().flatten().sub(first).tolist() for wanted_P in wanted_3P]
            assert looked == [looked[0]] * 3 == [found.setdefault(place, looked[0])] * 3
        return found

    # After the four rows' gaps: the square's gap and run in two rows, then the circle's run and gap.
    square = the_question(a_photo())
    assert led(square) == {(0, 0): [0], (1, 0): [4], (1, 1): [5], (2, 0): [6], (2, 1): [7], (3, 0): [3]}
    circle = replace(the_question(a_photo(), "absent"), cells_GG=(map_GG == 1).astype(np.uint8))
    answer = circle.answer.replace(" others *4\n</seg>", " circle *1| others *3\n</seg>")
    assert led(replace(circle, answer=answer)) == {(0, 0): [0], (1, 0): [1], (2, 0): [2], (3, 0): [8], (3, 1): [9]}
    one_of_two = replace(square, cells_GG=np.where(np.arange(GRID)[:, None] == 1, square.cells_GG, 0))
    answer = square.answer.replace("2\n others *2| square *2\n", "2\n others *4\n")
    assert set(map(tuple, led(replace(one_of_two, answer=answer)).values())) == {()}


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(tokenizer, tmp_path: Path) -> None:
    whole = trainer(tokenizer)
    for step in range(4):
        whole.step(step, step / 10)
    first = trainer(tokenizer)
    for step in range(2):
        first.step(step, step / 10)
    first.save(tmp_path / "checkpoint.pt", 2, 12.5)
    second = trainer(tokenizer)
    assert second.restore(tmp_path / "checkpoint.pt") == (2, 12.5)
    for step in range(2, 4):
        second.step(step, step / 10)
    expected = trained(whole)
    for name, tensor in trained(second).items():
        assert torch.equal(tensor, expected[name]), name
    assert second.restore(tmp_path / "missing.pt") == (0, 0.0)


def test_steps_lower_the_loss_of_the_answers(tokenizer) -> None:
    made = trainer(tokenizer, replace(OPTIONS, guide_weight=0.1, reading_share=0.0, readings_between=0))
    before = made.step(0, 0.0)["answers"]
    for step in range(1, 60):
        made.mean.clear()
        after = made.step(step, 0.0)["answers"]
    assert after < 0.7 * before


def test_sequences_are_the_same_whoever_makes_them_up(tokenizer) -> None:
    options = replace(OPTIONS, sequences=2)
    alone = trainer(tokenizer, options).batches(0)
    first, second = next(alone), next(alone)
    helped = trainer(tokenizer, replace(options, workers=2)).batches(0)
    later = trainer(tokenizer, options).batches(1)
    for expected, batches in ((first, helped), (second, helped), (second, later)):
        found = next(batches)
        assert len(found) == 2
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one.class_T, other.class_T)
            assert torch.equal(one.packed.ids_S, other.packed.ids_S)
            assert one.seed == other.seed
    assert not torch.equal(first[0].packed.ids_S, first[1].packed.ids_S)


@pytest.mark.parametrize("is_reading", [True, False])
def test_the_gradient_of_a_step_is_the_mean_over_its_sequences(tokenizer, is_reading: bool) -> None:
    made = trainer(tokenizer, replace(OPTIONS, sequences=2))
    drawn = next(made.batches(0))

    def gradients(sequences: list[Drawn]) -> list[torch.Tensor]:
        made.optimizer.zero_grad(set_to_none=False)
        made.model.llama.merge()
        made._sequences_step(sequences, is_reading)
        groups = (parameter for group in made.groups for parameter in group)
        return [torch.zeros(1) if half.grad is None else half.grad.clone() for half in groups]

    both, first, second = gradients(drawn), gradients(drawn[:1]), gradients(drawn[1:])
    assert any(half.any() for half in both)
    for together, one, other in zip(both, first, second, strict=True):
        torch.testing.assert_close(together, (one + other) / 2, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("is_reading", [True, False])
def test_a_step_makes_no_tensor_beside_its_device(tokenizer, is_reading: bool) -> None:
    """On a GPU what is made without a device would be on the CPU; here it has no memory at all, and cannot be used."""
    made = trainer(tokenizer)
    drawn = next(made.batches(0))
    with torch.device("meta"):
        made._sequences_step(drawn, is_reading)


def test_the_warm_up_makes_no_tensor_beside_its_device() -> None:
    targets = [cell_targets(a_photo(), GRID, CLASSES)] * 2
    with torch.device("meta"):
        logits = torch.zeros(2, GRID**2, 3, device="cpu")
        loss = cell_losses(logits, torch.zeros(2, GRID**2, 4, device="cpu"), targets) + presence_loss(logits, targets)
    assert loss.isfinite()


def test_a_short_run_answers_too(tokenizer, monkeypatch) -> None:
    """Reading is a share of whatever time there is: of half a minute as of two hours."""
    made = trainer(tokenizer, replace(TrainingOptions(minutes=0.5), rank=2, alpha=4.0, readings_between=0))
    told: list[bool] = []

    def heard(drawn: object, is_reading: bool) -> dict[str, float]:
        told.append(is_reading)
        return {}

    monkeypatch.setattr(made, "_sequences_step", heard)
    for share in (0.0, 0.29, 0.3, 0.9):
        made.step(0, share)
    assert told == [True, True, False, False]


def test_a_gradient_that_is_no_number_ends_the_run_before_it_changes_weights(tokenizer, monkeypatch) -> None:
    made = trainer(tokenizer)
    before = [half.detach().clone() for half in made.model.llama.named_halves().values()]
    half = next(iter(made.model.llama.named_halves().values()))

    def broken(drawn: object, is_reading: bool) -> dict[str, float]:
        half.grad = torch.full_like(half, float("nan"))
        return {}

    monkeypatch.setattr(made, "_sequences_step", broken)
    with pytest.raises(RelayModelsError, match=r"the gradient of step 8 is nan: lower the learning rate, 0\.01"):
        made.step(7, 0.5)
    assert all(map(torch.equal, before, made.model.llama.named_halves().values()))


def test_a_checkpoint_of_another_shape_is_refused(tokenizer, tmp_path: Path) -> None:
    """A half of rank 1 would fill one of any rank, and another alpha would scale what was trained."""
    trainer(tokenizer, replace(OPTIONS, rank=1)).save(tmp_path / "one.pt", 1, 1.0)
    with pytest.raises(CheckpointError, match=r"one\.pt was made with rank 1, and now it is 2"):
        trainer(tokenizer).restore(tmp_path / "one.pt")
    trainer(tokenizer).save(tmp_path / "two.pt", 1, 1.0)
    with pytest.raises(CheckpointError, match=r"two\.pt was made with alpha 4\.0, and now it is 8\.0"):
        trainer(tokenizer, replace(OPTIONS, alpha=8.0)).restore(tmp_path / "two.pt")


def test_training_goes_on_from_the_small_file(tokenizer, tmp_path: Path) -> None:
    first = trainer(tokenizer)
    first.step(0, 0.0)
    first.save(tmp_path / "checkpoint.pt", 1, 3.0)
    file = tmp_path / "small.safetensors"
    export(tmp_path / "checkpoint.pt", file)
    second = trainer(tokenizer)
    load_trained(second.model, file, OPTIONS)
    expected = {**first.model.llama.named_halves(), **first.model.projector.state_dict()}
    for name, tensor in {**second.model.llama.named_halves(), **second.model.projector.state_dict()}.items():
        assert torch.equal(tensor, expected[name].bfloat16().float()), name
    other = trainer(tokenizer, replace(OPTIONS, alpha=8.0))
    with pytest.raises(CheckpointError, match=r"lora_alpha of .*small\.safetensors is 4\.0, expected 8\.0"):
        load_trained(other.model, file, other.options)
    other = trainer(tokenizer, replace(OPTIONS, rank=3))
    with pytest.raises(CheckpointError, match=r"lora_A\.weight in .* has rank 2, expected 3"):
        load_trained(other.model, file, other.options)


CLASSES_NOW = ("arc", "hexagon", "square", "star")  # one of the file's two, circle and square, in another place
IS_NEW = [1, 2, 4]  # places of the others; 0 is what has no name


def trained_file(tokenizer, folder: Path) -> Path:
    made = trainer(tokenizer)
    made.step(0, 0.0)
    with torch.no_grad():
        for tensor in made.model.projector.state_dict().values():
            tensor.normal_()
    made.save(folder / "checkpoint.pt", 1, 3.0)
    export(folder / "checkpoint.pt", folder / "small.safetensors")
    return folder / "small.safetensors"


@pytest.mark.parametrize("sees_anew", [False, True])
def test_classes_are_matched_by_name(tokenizer, tmp_path: Path, sees_anew: bool) -> None:
    file = trained_file(tokenizer, tmp_path)
    _, stored = read_trained(file)
    now = trainer(tokenizer, classes=CLASSES_NOW).model
    with torch.no_grad():
        now.projector.codebook_KD.normal_()
    before = {name: tensor.clone() for name, tensor in now.projector.state_dict().items()}
    load_trained(now, file, OPTIONS, sees_anew=sees_anew)
    after = now.projector.state_dict()
    for name, half in now.llama.named_halves().items():
        assert torch.equal(half, stored[name].float()), name
    of_tokens = {"codebook_KD", "rows_GD", "columns_GD", "lengths_GD", "orders_GD", "gap_D", "unused_D"}
    of_classes = {"codebook_KD", "classify.weight", "classify.bias"}
    for name, tensor in after.items():
        of_file = stored[f"projector.{name}"].float()
        if sees_anew and name not in of_tokens:
            assert torch.equal(tensor, before[name]), name
        elif name in of_classes:
            assert torch.equal(tensor[[0, 3]], of_file[[0, 2]]), name
            if name != "codebook_KD":
                assert torch.equal(tensor[IS_NEW], before[name][IS_NEW]), name
        else:
            assert torch.equal(tensor, of_file), name
    new_MD, file_KD = after["codebook_KD"][IS_NEW], stored["projector.codebook_KD"].float()
    before_MD = before["codebook_KD"][IS_NEW]
    torch.testing.assert_close(new_MD.norm(dim=1), before_MD.norm(dim=1))
    shared = F.normalize(new_MD, dim=1) @ F.normalize(file_KD, dim=1).T
    assert shared.abs().max() < 1e-5
    assert (F.cosine_similarity(new_MD, before_MD) > 0.5).all()


def test_a_file_that_names_no_classes_is_refused(tokenizer, tmp_path: Path) -> None:
    file = trained_file(tokenizer, tmp_path)
    settings, tensors = read_trained(file)
    save_trained(tmp_path / "other.safetensors", tensors, lora_alpha=settings["lora_alpha"])
    with pytest.raises(CheckpointError, match="does not say of which classes it is: classes is None"):
        load_trained(trainer(tokenizer).model, tmp_path / "other.safetensors", OPTIONS)


def test_the_small_file_holds_what_was_trained(tokenizer, tmp_path: Path) -> None:
    made = trainer(tokenizer)
    for step in range(2):
        made.step(step, 0.0)
    made.save(tmp_path / "checkpoint.pt", 2, 3.0)
    export(tmp_path / "checkpoint.pt", tmp_path / "weights" / "small.safetensors")
    settings, tensors = read_trained(tmp_path / "weights" / "small.safetensors")
    assert settings == {
        "lora_alpha": 4.0,
        "projector_classes": 2,
        "projector_present_above": 0.2,
        "projector_named_above": 0.1,
    }
    made.model.llama.merge()
    layer = made.model.llama.layers[1]
    base, merged = layer.qkv.base[:48], layer.qkv.merged[:48]
    halves = [tensors[f"language_model.model.layers.1.self_attn.q_proj.lora_{half}.weight"].float() for half in "AB"]
    delta = settings["lora_alpha"] / len(halves[0]) * halves[1] @ halves[0]
    assert delta.abs().max() > 0
    torch.testing.assert_close(base + delta, merged, rtol=0.05, atol=1e-4)
    for name, tensor in made.model.projector.state_dict().items():
        assert torch.equal(tensors[f"projector.{name}"], tensor.bfloat16())
    from safetensors import safe_open

    with safe_open(tmp_path / "weights" / "small.safetensors", framework="pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training["steps"] == 2
    assert training["classes"] == list(CLASSES)
    assert training["options"]["rank"] == 2


def test_the_warm_up_teaches_classes_and_goes_on_where_it_was(tokenizer, tmp_path: Path, monkeypatch) -> None:
    ticks = count()  # two a step: as many steps on a slow machine as on a fast one
    monkeypatch.setattr(warmup, "time", SimpleNamespace(monotonic=lambda: next(ticks) * 0.005))
    made = trainer(tokenizer)
    options = WarmupOptions(minutes=0.05, photos=3, rate=1e-2)
    warm_up(options, made.model, made.data.variants, made.data.weights, tmp_path / "projector.pt")
    variant = made.data.variants[0]
    made.model.projector.eval()
    with torch.no_grad():
        features = torch.from_numpy(np.asarray(variant.features)).float()
        classes = made.model.projector.classify(made.model.projector.hidden(features)).argmax(-1)
    expected = np.stack([cell_targets(photo, GRID, CLASSES).class_T for photo in variant.photos])
    assert (classes.numpy() == expected).mean() > 0.9
    other = trainer(tokenizer)
    warm_up(options, other.model, other.data.variants, other.data.weights, tmp_path / "projector.pt")
    for name, tensor in other.model.projector.state_dict().items():
        assert torch.equal(tensor, made.model.projector.state_dict()[name]), name
    renamed = Model(other.model.projector, other.model.shape_head, other.model.llama, ("square", "circle"))
    with pytest.raises(RelayModelsError, match="made with other classes"):
        warm_up(options, renamed, other.data.variants, other.data.weights, tmp_path / "projector.pt")


def test_the_warm_up_also_asks_which_classes_are_there(tokenizer, tmp_path: Path, monkeypatch) -> None:
    """Of a photo nothing of which has a name for certain, cells alone teach nothing: that there is no circle does."""
    ticks = count()
    monkeypatch.setattr(warmup, "time", SimpleNamespace(monotonic=lambda: next(ticks) * 0.005))
    made = trainer(tokenizer)
    unsure = replace(a_photo(), instances=(), labelled_classes=(), absent=("circle",))
    variant = Variant((unsure,), made.data.variants[0].features[:1])
    features = torch.from_numpy(np.asarray(variant.features)).float()

    def circle() -> float:
        with torch.no_grad():
            logits = made.model.projector.classify(made.model.projector.hidden(features))
        return float(logits.softmax(-1)[..., 1].max())

    made.model.projector.eval()
    before = circle()
    options = WarmupOptions(minutes=0.02, photos=1, rate=1e-2, weight_decay=0.0)
    warm_up(options, made.model, [variant], np.ones(1), tmp_path / "projector.pt")
    made.model.projector.eval()
    assert circle() < before / 4


@pytest.mark.parametrize("field", ["minutes", "rank", "tokens", "processes"])
def test_impossible_options_are_refused(field: str) -> None:
    with pytest.raises(RelayModelsError, match=f"{field} must be positive and finite, got 0"):
        replace(OPTIONS, **{field: 0})


def test_times_and_rates_that_are_no_numbers_are_refused() -> None:
    for field in ("minutes", "lora_rate"):
        with pytest.raises(RelayModelsError, match=f"{field} must be positive and finite, got nan"):
            replace(OPTIONS, **{field: float("nan")})
    with pytest.raises(RelayModelsError, match="reading_share must be at least 0 and below 1, got 1"):
        replace(OPTIONS, reading_share=1)
    with pytest.raises(RelayModelsError, match="minutes must be finite and not negative, got inf"):
        WarmupOptions(minutes=float("inf"))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"device": "tpu"}, "device must be cpu, or cuda with one process, got 'tpu'"),
        ({"device": "cuda", "processes": 2}, "got 'cuda' and processes 2"),
        ({"sequences": 0}, "sequences must be at least 1 and workers 0, got 0 and 0"),
        ({"workers": -1}, "got 1 and -1"),
    ],
)
def test_devices_and_workers_that_cannot_be_are_refused(given: dict[str, object], problem: str) -> None:
    with pytest.raises(RelayModelsError, match=problem):
        replace(OPTIONS, **given)
