"""Maps of classes to learn reading from: what they are of, and what is asked about them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from relay_models.recipes.text4seg import maps
from relay_models.recipes.text4seg.cells import cell_targets
from relay_models.recipes.text4seg.dataset import Instance, Photo
from relay_models.recipes.text4seg.features import Variant
from relay_models.recipes.text4seg.maps import MOST_SPECKLES, MapDrawer
from relay_models.recipes.text4seg.questions import QuestionMix, questions_of_map
from relay_models.relay_seg.projector import Projector, ProjectorSizes

GRID, SIDE = 8, 32
CLASSES = ("cat", "dog", "person")


def photo(number: int, label: str) -> Photo:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[4 : 8 + 4 * number, 8:24] = True
    return Photo(f"{number}.jpg", SIDE, SIDE, (Instance.of(0, label, mask),))


@pytest.fixture
def drawer() -> MapDrawer:
    torch.manual_seed(0)
    sizes = ProjectorSizes(channels=5, grid=GRID, width=16, num_layers=1, num_heads=2, num_classes=3, out_width=12)
    photos = (photo(1, "cat"), photo(2, "dog"))
    features = np.random.default_rng(0).normal(size=(2, 5, GRID, GRID)).astype(np.float16)
    return MapDrawer(Projector(sizes).eval(), [Variant(photos, features)], np.array([0.5, 0.5]), CLASSES)


def test_equal_seeds_draw_equal_maps_of_known_classes(drawer: MapDrawer) -> None:
    drawn = [[drawer.draw(np.random.default_rng(seed)) for seed in range(60)] for _ in range(2)]
    assert all(np.array_equal(first, second) for first, second in zip(*drawn, strict=True))
    assert {map_GG.shape for map_GG in drawn[0]} == {(GRID, GRID)}
    assert set(np.unique(drawn[0])) == {0, 1, 2, 3}
    assert len({map_GG.tobytes() for map_GG in drawn[0]}) > 40


def test_maps_of_a_photo_are_its_masks_or_what_is_seen(drawer: MapDrawer) -> None:
    variant = drawer.variants[0]
    with torch.no_grad():
        for vectors in drawer.projector.of_tokens():
            vectors.normal_()  # they begin as nothing: all tokens would be equal
    for index in range(2):
        expected = cell_targets(variant.photos[index], GRID, CLASSES).class_T.reshape(GRID, GRID)
        assert np.array_equal(drawer.true(0, index), expected)
        features = torch.from_numpy(np.array(variant.features[index : index + 1])).float()
        with torch.no_grad():
            seen_NT = torch.from_numpy(drawer.seen(0, index)).reshape(1, -1)
            assert torch.equal(drawer.projector(features), drawer.projector.tokens(seen_NT))


def test_drawing_leaves_the_photos_alone(drawer: MapDrawer) -> None:
    before = [drawer.true(0, index).copy() for index in range(2)]
    for seed in range(30):
        drawer.draw(np.random.default_rng(seed))
    assert all(np.array_equal(drawer.true(0, index), before[index]) for index in range(2))


def test_classes_are_drawn_though_no_photo_shows_one(drawer: MapDrawer) -> None:
    blank = Photo("a.jpg", SIDE, SIDE, ())
    bare = replace(drawer, variants=[Variant((blank, blank), drawer.variants[0].features)])
    assert {bare.some_class(np.random.default_rng(seed)) for seed in range(40)} == {1, 2, 3}


def test_classes_change_places_and_cells_do_not(drawer: MapDrawer) -> None:
    begun = np.array([[0, 1, 1, 0], [2, 2, 1, 0], [0, 3, 0, 0], [0, 0, 0, 0]])
    became: Counter[tuple[int, ...]] = Counter()
    for seed in range(300):
        renamed = drawer._renamed(begun, np.random.default_rng(seed))
        pairs = set(zip(begun.flat, renamed.flat, strict=True))
        assert len(pairs) == 4  # one class for each, and no two the same
        assert (0, 0) in pairs
        became[tuple(renamed[place] for place in ((0, 1), (1, 0), (2, 1)))] += 1
    assert len(became) == 6
    assert min(became.values()) > 25


def test_a_rare_class_is_drawn_almost_as_often_as_others(drawer: MapDrawer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos show no person, and nothing else is drawn on them here."""
    for name, share in {"EMPTY": 0, "TRUE": 1, "DRAWN_ON": 0, "SPECKLED": 0}.items():
        monkeypatch.setattr(maps, name, share)
    rng = np.random.default_rng(0)
    shown = Counter(int(number) for _ in range(400) for number in np.unique(drawer.draw(rng)))
    assert shown[3] > 0.5 * max(shown[1], shown[2])
    asked = Counter(drawer.any_class(rng) for _ in range(600))
    assert min(asked[number] for number in (1, 2, 3)) > 100


def test_speckles_are_single_cells(drawer: MapDrawer) -> None:
    blank = np.zeros((GRID, GRID), np.int64)
    changed = [int((drawer._with_speckles(blank, np.random.default_rng(seed)) > 0).sum()) for seed in range(50)]
    assert max(changed) <= MOST_SPECKLES
    assert sum(number > 0 for number in changed) > 30


MAP = np.array([[0, 1, 1, 0], [0, 1, 3, 3], [0, 0, 3, 3], [0, 0, 0, 0]])


def test_each_class_of_a_map_is_asked_for_and_each_that_is_not_there() -> None:
    for seed in range(20):
        mix = QuestionMix(multi_class_share=0.0)
        found = questions_of_map(MAP, CLASSES, [2, 1, 2], np.random.default_rng(seed), mix)
        assert sorted(item.kind for item in found) == ["absent", "class", "class"]
        for item in found:
            (_, said) = item.labels
            (number,) = [n for n, names in enumerate((("cat",), ("dog",), ("person", "people")), 1)
                         if any(name in said for name in names)]  # fmt: skip
            assert np.array_equal(item.cells_GG > 0, number == MAP)
            assert not item.ignore_GG.any()
            assert said in item.prompt


def test_several_classes_at_once_are_those_of_the_map() -> None:
    seen = set()
    for seed in range(40):
        mix = QuestionMix(multi_class_share=1.0)
        found = questions_of_map(MAP, CLASSES, [2, 2], np.random.default_rng(seed), mix)
        (item,) = [item for item in found if item.kind == "classes"]
        named = np.array([0, *(1 + CLASSES.index(label) for label in item.labels[1:])])
        shown = np.isin(MAP, named)
        assert np.array_equal(named[item.cells_GG], np.where(shown, MAP, 0))
        seen.add(item.labels)
    assert len(seen) > 5
    assert questions_of_map(np.zeros_like(MAP), CLASSES, [], np.random.default_rng(0)) == []
