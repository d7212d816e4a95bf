"""Synthetic patches: logistic regression of scikit-learn checks what predicts their labels."""

import itertools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from bef_jax.data.sources import synthetic


def draw(split, n, seed=0):
    chunks = list(synthetic.generate(split, n, seed))
    return tuple(
        np.concatenate(parts) for parts in zip(*(chunk[:3] for chunk in chunks), strict=True)
    )


@pytest.fixture(scope="module")
def patches():
    return draw("train", 2048)


def linear_auc(features, labels):
    """Fits a logistic regression to half of the patches, and returns its AUC on the others."""
    half = len(labels) // 2
    scaler = StandardScaler().fit(features[:half])
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(features[:half]), labels[:half])
    return roc_auc_score(labels[half:], model.decision_function(scaler.transform(features[half:])))


def darkness(images, top):
    """Returns red at the ranks `top`, darkest first, and its shares below 60 and 100: [N, F].

    Haematoxylin absorbs red.
    """
    red = np.sort(images[..., 0].reshape(len(images), -1), axis=1)
    return np.concatenate([red[:, top], (red[:, None] < [[60], [100]]).mean(axis=2)], axis=1)


def test_shapes_ids_and_balance(patches):
    images, labels, ids = patches
    assert images.shape == (2048, 96, 96, 3)
    assert images.dtype == labels.dtype == np.uint8
    assert len(set(ids)) == 2048
    assert abs(labels.mean() - 0.5) < 5 * 0.5 / np.sqrt(2048)
    assert len({image.tobytes() for image in images}) == 2048


def test_patches_depend_only_on_split_seed_and_index(patches):
    again = draw("train", 200)
    for one, other in zip(again, patches, strict=True):
        np.testing.assert_array_equal(one, other[:200])
    variants = [
        draw(split, 8, seed)[0] for split, seed in (("train", 0), ("train", 1), ("test", 0))
    ]
    for one, other in itertools.combinations(variants, 2):
        assert (one != other).mean() > 0.5


def test_length_is_exact():
    for n in (1, 127, 128, 129):
        assert len(draw("valid", n)[1]) == n


def test_the_center_predicts_the_label(patches):
    images, labels, _ = patches
    center = images[:, 32:64, 32:64]
    assert linear_auc(darkness(center, [0, 20, 60, 120, 200]), labels) > 0.97


def test_the_rim_does_not_predict_the_label(patches):
    images, labels, _ = patches
    rim = images.copy()
    rim[:, 32:64, 32:64] = 255
    features = np.concatenate(
        [darkness(rim, [0, 50, 200, 800]), rim.mean(axis=(1, 2)), rim.std(axis=(1, 2))], axis=1
    )
    # Four standard deviations of the AUC of random guesses on 512 patches of each class.
    assert abs(linear_auc(features, labels) - 0.5) < 4 * np.sqrt(2 / (12 * 512))


def test_the_rim_of_a_patch_is_drawn_without_its_label(monkeypatch):
    real = synthetic._draw_central_tumour

    def draw_for_opposite_labels(rng, canvas, labels):
        real(rng, canvas, 1 - labels)

    before = draw("train", 128)[0]
    monkeypatch.setattr(synthetic, "_draw_central_tumour", draw_for_opposite_labels)
    after = draw("train", 128)[0]
    changed = (before != after).any(axis=(0, 3))
    inside = np.zeros_like(changed)
    inside[32:64, 32:64] = True
    assert changed[inside].mean() > 0.7  # all but the corners
    assert not changed[~inside].any()


def test_distractors_are_equally_common_in_both_classes(patches):
    images, labels, _ = patches
    rim = images[..., 0].astype(int)
    rim[:, 22:74, 22:74] = 255
    has_distractor = (rim < 70).sum(axis=(1, 2)) > 40
    shares = [has_distractor[labels == label].mean() for label in (0, 1)]
    assert min(shares) > 0.2
    assert abs(shares[0] - shares[1]) < 4 * np.sqrt(2 * 0.25 / 1024)


def test_mean_colour_alone_predicts_the_label_poorly(patches):
    images, labels, _ = patches
    assert linear_auc(images.mean(axis=(1, 2)), labels) < 0.8


def test_colours_are_those_of_stained_tissue(patches):
    mean = patches[0].mean(axis=(0, 1, 2)) / 255
    # These are PCam's means. The tolerance allows for another scanner. Both stains absorb green.
    np.testing.assert_allclose(mean, (0.70, 0.54, 0.69), atol=0.12)
    assert mean.argmin() == 1


@pytest.mark.parametrize("side", [32, 96, 97, 512])
def test_drawn_patches_have_the_networks_size_and_are_tissue_all_over(side):
    """Every 32 x 32 of the patches is as varied as the drawn patches themselves."""
    patches, drawn = synthetic.drawn_patches(side, 16), synthetic.drawn_patches(96, 16)
    assert (patches.shape, patches.dtype) == ((16, side, side, 3), np.uint8)
    corners = [patches[:, :32, :32], patches[:, -32:, -32:], patches[:, -32:, :32]]
    assert min(corner.std() for corner in corners) > 0.8 * drawn.std()
    if side == 97:  # the mirror image begins with the last row and column
        np.testing.assert_array_equal(patches[:, :96, :96], drawn)
        np.testing.assert_array_equal(patches[:, 96], patches[:, 95])
