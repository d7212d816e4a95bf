"""The gallery's choice of patches, compared with a brute-force sort, and how it draws them."""

import numpy as np
import pytest

from bef_jax.report.gallery import (
    SHOWN,
    central_share,
    contact_sheet,
    pick,
    show,
    with_heat_map,
    with_square,
)


def test_the_most_confident_patches_match_a_brute_force_sort(evaluation):
    seen = evaluation(n=300)
    expected = {
        "false positives": (lambda p, label: p >= 0.5 and not label, lambda p: -p),
        "false negatives": (lambda p, label: p < 0.5 and label, lambda p: p),
        "true positives": (lambda p, label: p >= 0.5 and label, lambda p: -p),
        "true negatives": (lambda p, label: p < 0.5 and not label, lambda p: p),
    }
    found = pick(seen)
    assert found.keys() == expected.keys()
    for kind, (belongs, order) in expected.items():
        rows = [i for i in range(300) if belongs(seen.probabilities[i], seen.labels[i])]
        rows.sort(key=lambda i: order(seen.probabilities[i]))
        assert found[kind].tolist() == rows[:SHOWN]


def test_reads_only_the_patches_it_shows(evaluation):
    class Counting:
        def __init__(self):
            self.read = set()

        def __getitem__(self, rows):
            self.read.update(rows)
            return np.zeros((len(rows), 96, 96, 3), np.uint8)

    patches, seen = Counting(), evaluation(n=300)
    show(seen, patches, None)
    assert patches.read == set(np.concatenate(list(pick(seen).values())).tolist())


def test_each_decision_is_explained_as_it_was_taken(evaluation, images):
    asked = []

    def explain(patches, called):
        asked.append((patches, called))
        heat = np.zeros((len(patches), 96, 96), np.float32)
        heat[:, 40:42, 40:42] = 0.25
        return heat

    seen = evaluation()
    shown = show(seen, images, explain, 32)
    ((patches, called),) = asked
    assert called.tolist() == [each.probability >= 0.5 for each in shown]
    rows = [seen.ids.tolist().index(each.id) for each in shown]
    np.testing.assert_array_equal(patches, images[rows])
    assert {each.in_centre for each in shown} == {1.0}
    assert {each.pixels.shape for each in shown} == {(96, 196, 3)}


def test_the_central_share_counts_only_the_deciding_square():
    assert central_share(np.ones((96, 96)), 32) == pytest.approx(1 / 9)
    assert central_share(np.ones((97, 97)), 97) == 1
    heat = np.zeros((96, 96))
    heat[31, 50] = heat[32, 32] = heat[63, 63] = heat[64, 40] = 1
    assert central_share(heat, 32) == 0.5
    assert central_share(heat, 34) == 1
    assert central_share(heat, 0) is None
    assert central_share(np.zeros((96, 96)), 32) is None


def test_a_heat_map_covers_only_the_pixels_with_heat():
    patch = np.full((96, 96, 3), 200, np.uint8)
    heat = np.zeros((96, 96), np.float32)
    heat[10, 20] = 1e-9
    found = with_heat_map(patch, heat)
    assert (found[10, 20] != 200).any()
    found[10, 20] = 200
    np.testing.assert_array_equal(found, patch)
    np.testing.assert_array_equal(with_heat_map(patch, 0 * heat), patch)


@pytest.mark.parametrize(("side", "center"), [(96, 32), (65, 33), (224, 220)])
def test_the_frame_lies_around_the_square_and_changes_nothing_inside(side, center):
    patch, first = np.full((side, side, 3), 100, np.uint8), (side - center) // 2
    changed = (with_square(patch, center) != patch).any(axis=2)
    last, inside = side - first, slice(first, side - first)
    assert not changed[inside, inside].any()
    around = slice(first - 1, last + 1)
    assert changed[first - 1, around].all() and changed[last, around].all()
    assert changed[first - 2 : last + 2, first - 2].all()
    assert changed[: first - 2].sum() == changed[last + 2 :].sum() == 0
    assert (patch == 100).all()


@pytest.mark.parametrize("center", [0, 96, 94])
def test_a_square_that_is_the_whole_patch_has_no_frame(center):
    patch = np.full((96, 96, 3), 100, np.uint8)
    np.testing.assert_array_equal(with_square(patch, center), patch)


@pytest.mark.parametrize(("side", "zoom"), [(32, 6), (96, 2), (97, 1), (224, 1)])
def test_the_contact_sheet_enlarges_small_patches_only(side, zoom, evaluation):
    shown = show(evaluation(), np.zeros((300, side, side, 3), np.uint8), None)
    assert contact_sheet(shown).shape[1] == 4 * (zoom * side + 12)
