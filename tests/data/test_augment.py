"""Compares augmentation with brute force over windows, NumPy symmetries and float64 formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from bef_jax.configs.default import get_config
from bef_jax.data import augment

# Every pixel has its own number, so that a window's pixels say where it was cut.
CODES = np.arange(96 * 96, dtype=np.uint16).reshape(96, 96, 1)


def make_images(n, size=96):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def make_config(**fields):
    config = get_config()
    config.update_from_flattened_dict(fields)
    return config


def assert_uniform(values, choices):
    """Checks that all choices come equally often, within 5 standard deviations."""
    counts = np.array([np.sum(np.asarray(values) == choice) for choice in choices])
    assert counts.sum() == np.size(values)
    expected = np.size(values) / len(counts)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


# ---- random center cropping ---------------------------------------------------------------------


# (side of the patch, side of the square in its middle); 0 means that there is none.
PATCHES = [(96, 32), (96, 0), (97, 33), (64, 64), (32, 0), (33, 1), (224, 100)]


def allowed_corners(size, side=96, center=32):
    """Finds by brute force where a window is inside the patch and holds its central rows."""
    rows = list(range(side))
    while len(rows) > center:  # takes a row from each end, until only the central ones are left
        rows = rows[1:-1]
    inside = [at for at in range(-side, side + 1) if at >= 0 and at + size <= side]
    return [at for at in inside if set(rows) <= set(range(at, at + size))]


def test_the_allowed_corners_keep_rows_32_to_63_of_pcam():
    assert allowed_corners(40) == list(range(24, 33))


@pytest.mark.parametrize(("side", "center"), PATCHES)
def test_offset_bounds_are_exactly_the_corners_that_keep_the_center(side, center):
    for size in range(max(center, 1), side + 1):
        first, last = augment.corner_bounds(size, side, center)
        assert list(range(int(first), int(last) + 1)) == allowed_corners(size, side, center)


@functools.partial(jax.jit, static_argnums=3)
def crop(images, sizes, offsets, canvas):
    return augment.crop_windows(images, sizes, offsets, canvas)


@pytest.mark.slow
@pytest.mark.parametrize("canvas", [64, 80, 96])
def test_every_window_of_every_size_is_cut_whole(canvas):
    # Size 64 has the most windows. Other sizes are padded to as many, so that it compiles once.
    most = 33 * 33
    images = jnp.asarray(np.broadcast_to(CODES, (most, *CODES.shape)))
    for size in range(32, canvas + 1):
        corners = allowed_corners(size)
        offsets = np.array([(row, column) for row in corners for column in corners])
        n = len(offsets)
        padded = np.resize(offsets, (most, 2))
        cut, inside = crop(images, np.full(most, size), padded, canvas)
        cut, inside = np.asarray(cut)[:n, ..., 0], np.asarray(inside)[:n, ..., 0]
        assert (inside.sum((1, 2)) == size * size).all()
        windows = cut[inside].reshape(n, size, size)
        in_patch = np.lib.stride_tricks.sliding_window_view(CODES[..., 0], (size, size))
        np.testing.assert_array_equal(windows, in_patch[offsets[:, 0], offsets[:, 1]])
        # The canvas is a part of the patch. It is centered on the window, except at the border.
        start = np.clip(offsets - (canvas - size) // 2, 0, 96 - canvas)
        in_patch = np.lib.stride_tricks.sliding_window_view(CODES[..., 0], (canvas, canvas))
        np.testing.assert_array_equal(cut, in_patch[start[:, 0], start[:, 1]])


def test_one_batch_may_have_windows_of_several_sizes():
    images = make_images(3)
    sizes, offsets = np.array([32, 50, 64]), np.array([[32, 32], [46, 14], [0, 32]])
    cut, inside = augment.crop_windows(jnp.asarray(images), sizes, offsets, 64)
    assert cut.shape == (3, 64, 64, 3)
    for image, size, (row, column), canvas, mask in zip(
        images, sizes, offsets, np.asarray(cut), np.asarray(inside), strict=True
    ):
        expected = image[row : row + size, column : column + size]
        np.testing.assert_array_equal(canvas[mask[..., 0]].reshape(size, size, 3), expected)


def windows(key, n, side, center, least, greatest):
    rcc = ConfigDict({"center": center, "min_size": least, "max_size": greatest})
    return augment.sample_windows(jax.random.key(key), n, side, rcc)


@pytest.mark.parametrize(("least", "greatest"), [(32, 96), (64, 96), (64, 64), (33, 47)])
def test_sampled_windows_hold_the_center_and_cover_all_sizes(least, greatest):
    sizes, offsets = map(np.asarray, windows(1, 20_000, 96, 32, least, greatest))
    assert_uniform(sizes, range(least, greatest + 1))
    assert (offsets >= 0).all()
    assert (offsets <= 32).all()
    assert (offsets + sizes[:, None] >= 64).all()
    assert (offsets + sizes[:, None] <= 96).all()


@pytest.mark.parametrize(
    ("side", "center", "least", "greatest"),
    [(32, 0, 1, 32), (32, 32, 32, 32), (97, 33, 33, 64), (224, 32, 149, 224), (512, 256, 256, 300)],
)
def test_each_of_200_windows_of_any_patch_holds_its_center(side, center, least, greatest):
    for size, corner in zip(*windows(3, 200, side, center, least, greatest), strict=True):
        assert least <= size <= greatest
        for at in corner.tolist():
            covered = np.zeros(side + 1)
            covered[at : at + int(size)] = 1
            # The last entry would be a row beyond the patch. None of the window is cut off.
            assert at >= 0 and covered.sum() == size and not covered[side]
            margin = (side - center) // 2
            assert covered[margin : side - margin].all() or not center


@pytest.mark.parametrize(
    ("size", "side", "center"),
    [(40, 96, 32), (64, 96, 32), (81, 96, 32), (90, 97, 33), (20, 32, 0), (5, 33, 0)],
)
def test_sampled_corners_are_uniform(size, side, center):
    """Without a center, the windows reach every place of the patch."""
    _, offsets = windows(2, 20_000, side, center, size, size)
    for axis in (0, 1):
        assert_uniform(offsets[:, axis], allowed_corners(size, side, center))
    centered = np.asarray(offsets - offsets.mean(0), np.float64)
    correlation = (centered[:, 0] * centered[:, 1]).mean() / centered.std(0).prod()
    assert abs(correlation) < 0.04  # more than 5 standard deviations


def test_a_window_without_a_center_lies_anywhere():
    """The windows together show every pixel, and each is a part of its own patch."""
    rcc = make_config(**{"rcc.center": 0, "rcc.min_size": 7, "rcc.max_size": 12}).rcc
    codes = CODES[:33, :33].astype(np.int32)
    images = jnp.asarray(np.broadcast_to(codes, (3000, *codes.shape)))
    cut, inside = map(np.asarray, augment.random_center_crop(jax.random.key(0), images, rcc))
    assert cut.shape == (3000, 12, 12, 1)
    assert set(cut[inside].tolist()) == set(codes.ravel().tolist())
    assert set(inside.sum((1, 2, 3)).tolist()) == {size**2 for size in range(7, 13)}


def test_random_center_crop_keeps_the_center_of_each_image():
    rcc = make_config(**{"rcc.min_size": 32, "rcc.max_size": 64}).rcc
    images = jnp.asarray(np.broadcast_to(CODES, (50, *CODES.shape)))
    cut, inside = jax.jit(functools.partial(augment.random_center_crop, rcc=rcc))(
        jax.random.key(0), images
    )
    center = set(CODES[32:64, 32:64].ravel().tolist())
    windows = [set(c[i].tolist()) for c, i in zip(np.asarray(cut), np.asarray(inside), strict=True)]
    assert all(center <= window for window in windows)
    assert len({len(window) for window in windows}) > 10


# ---- flips and turns ----------------------------------------------------------------------------


def test_symmetries_are_the_eight_of_a_square():
    image = make_images(1, 5)[0]
    group = [np.rot90(side, turns) for side in (image, np.flip(image, 1)) for turns in range(4)]
    results = augment.symmetry(jnp.asarray(np.stack([image] * 8)), jnp.arange(8))
    matches = [[np.array_equal(result, element) for element in group] for result in results]
    assert np.array(matches).sum(0).tolist() == [1] * 8
    assert np.array(matches).sum(1).tolist() == [1] * 8
    np.testing.assert_array_equal(results[0], image)


def test_each_image_gets_its_own_symmetry():
    images, which = make_images(8, 6), np.array([3, 0, 7, 5, 1, 2, 6, 4])
    results = augment.symmetry(jnp.asarray(images), which)
    for image, bits, result in zip(images, which, results, strict=True):
        expected = image[::-1] if bits & 1 else image
        expected = expected[:, ::-1] if bits & 2 else expected
        expected = np.swapaxes(expected, 0, 1) if bits & 4 else expected
        np.testing.assert_array_equal(result, expected)


def test_random_symmetry_takes_all_eight_equally_often():
    images = np.broadcast_to(np.arange(4, dtype=np.uint8).reshape(2, 2, 1), (8000, 2, 2, 1))
    results = np.asarray(augment.random_symmetry(jax.random.key(0), jnp.asarray(images)))
    numbers = results.reshape(-1, 4) @ [64, 16, 4, 1]
    assert len(np.unique(numbers)) == 8
    assert_uniform(numbers, np.unique(numbers))


# ---- stains -------------------------------------------------------------------------------------


def restain_by_definition(images, factors, offsets):
    """Unmixes, changes and mixes the stains one after the other, in float64."""
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains /= np.sqrt((stains**2).sum(1, keepdims=True))
    density = -np.log((np.float64(images) + 1) / 256)
    amounts = np.linalg.solve(stains.T, density.reshape(-1, 3).T).T.reshape(density.shape)
    amounts = amounts * factors[:, None, None] + offsets[:, None, None]
    return np.clip(256 * np.exp(-(amounts @ stains)) - 1, 0, 255)


def test_restain_agrees_with_the_definition():
    rng = np.random.default_rng(1)
    images = make_images(6, 8)
    factors, offsets = rng.uniform(0.7, 1.3, (6, 3)), rng.uniform(-0.1, 0.1, (6, 3))
    actual = augment.restain(jnp.asarray(images), np.float32(factors), np.float32(offsets))
    np.testing.assert_allclose(actual, restain_by_definition(images, factors, offsets), atol=0.02)


def test_restain_with_factors_1_and_offsets_0_changes_nothing():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = np.concatenate([images, make_images(1, 16)])
    actual = augment.restain(jnp.asarray(images), jnp.ones((2, 3)), jnp.zeros((2, 3)))
    np.testing.assert_allclose(actual, images, atol=0.05)  # of 255 levels


def test_only_the_stain_in_a_pixel_changes_its_colour():
    stains = augment.STAINS / np.linalg.norm(augment.STAINS, axis=1, keepdims=True)
    pixel = 256 * np.exp(-0.8 * stains[0]) - 1  # 0.8 of haematoxylin, and no other stain
    factors = jnp.array([[1.5, 1, 1], [1, 1.5, 1], [1, 1, 1.5]])
    images = jnp.asarray(np.tile(np.float32(pixel), (3, 1, 1, 1)))
    restained = np.asarray(augment.restain(images, factors, jnp.zeros((3, 3))))
    more_haematoxylin, more_eosin, more_residual = restained[:, 0, 0]
    np.testing.assert_allclose(more_haematoxylin, 256 * np.exp(-1.2 * stains[0]) - 1, rtol=1e-3)
    np.testing.assert_allclose(more_eosin, pixel, rtol=1e-3)
    np.testing.assert_allclose(more_residual, pixel, rtol=1e-3)


def test_stain_jitter_draws_factors_and_offsets_per_image_within_bounds():
    stains = augment.STAINS / np.linalg.norm(augment.STAINS, axis=1, keepdims=True)
    amounts = np.array([0.5, 0.5, 0.2])
    pixel = np.float32(256 * np.exp(-amounts @ stains) - 1)
    images = jnp.asarray(np.tile(pixel, (3000, 1, 1, 1)))

    def recovered(scale, shift):
        jittered = np.asarray(augment.stain_jitter(jax.random.key(0), images, scale, shift))
        density = -np.log((np.float64(jittered[:, 0, 0]) + 1) / 256)
        return np.linalg.solve(stains.T, density.T).T

    factors = recovered(0.3, 0.0) / amounts
    offsets = recovered(0.0, 0.04) - amounts
    for values, bound in ((factors - 1, 0.3), (offsets, 0.04)):
        assert np.abs(values).max() <= bound * 1.01
        np.testing.assert_allclose(values.mean(0), 0, atol=0.05 * bound)
        np.testing.assert_allclose(values.std(0), bound / np.sqrt(3), rtol=0.05)
        assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.1


# ---- normalisation and views --------------------------------------------------------------------


def test_normalise_agrees_with_the_formula():
    images, fields = make_images(2, 16), get_config().augment
    actual = augment.normalise(jnp.asarray(images), fields)
    assert actual.dtype == jnp.float32
    expected = (np.float64(images) / 255 - fields.mean) / fields.std
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    np.testing.assert_allclose(
        augment.white(fields), (1 - np.array(fields.mean)) / fields.std, atol=1e-5
    )


@pytest.mark.parametrize(
    ("enabled", "patch", "size", "side"),
    [(True, 96, 64, 64), (True, 96, 96, 96), (False, 96, 64, 96), (True, 97, 33, 33),
     (False, 224, 96, 224)],
)  # fmt: skip
def test_eval_view_is_the_normalised_center(enabled, patch, size, side):
    fields = {"data.patch_size": patch, "rcc.enabled": enabled, "rcc.eval_size": size}
    config = make_config(**fields)
    images, first = make_images(2, patch), (patch - side) // 2
    center = images[:, first : first + side, first : first + side]
    expected = (np.float64(center) / 255 - config.augment.mean) / config.augment.std
    view = augment.eval_inputs(jnp.asarray(images), config)
    assert view.shape == (2, side, side, 3)
    np.testing.assert_allclose(view, expected, atol=1e-5)


# ---- all together -------------------------------------------------------------------------------

AUGMENTATIONS = {
    "nothing": {},
    "flips": {"augment.flips": True},
    "stain": {"augment.stain": 0.2, "augment.stain_shift": 0.05},
    "rcc": {"rcc.enabled": True, "rcc.min_size": 40, "rcc.max_size": 80},
}
AUGMENTATIONS["all"] = {
    name: value for fields in AUGMENTATIONS.values() for name, value in fields.items()
}
OFF = {
    "augment.flips": False,
    "augment.stain": 0.0,
    "augment.stain_shift": 0.0,
    "rcc.enabled": False,
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augment_gives_the_same_with_and_without_jit(name):
    config, key = make_config(**OFF | AUGMENTATIONS[name]), jax.random.key(3)
    images = jnp.asarray(make_images(3))
    plain = augment.augment(key, images, config)
    jitted = jax.jit(functools.partial(augment.augment, config=config))
    side = 80 if config.rcc.enabled else 96
    assert plain.shape == (3, side, side, 3)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(jitted(key, images), plain, atol=2e-4)
    np.testing.assert_array_equal(jitted(key, images), jitted(key, images))
    untouched = augment.normalise(images, config.augment)
    if name == "nothing":
        np.testing.assert_allclose(plain, untouched, atol=1e-6)
    else:
        other = jitted(jax.random.key(4), images)
        assert all(np.abs(other - plain).max((1, 2, 3)) > 0.01)


FUNCTIONS = {
    "symmetry": augment.symmetry,
    "crop_windows": lambda x, i: augment.crop_windows(
        x, i + 60, 2 * i[:, None] + jnp.arange(2), 72
    ),
    "center_crop": lambda x, i: augment.center_crop(x, 64),
    "restain": lambda x, i: augment.restain(
        x, 1 + i[:, None] / 20 * jnp.ones(3), jnp.ones((3, 3)) / 9
    ),
    "random_symmetry": lambda x, i: augment.random_symmetry(jax.random.key(i[0]), x),
    "random_center_crop": lambda x, i: augment.random_center_crop(
        jax.random.key(i[0]), x, get_config("rcc.max_size=80").rcc
    ),
    "stain_jitter": lambda x, i: augment.stain_jitter(jax.random.key(i[0]), x, 0.2, 0.05),
    "normalise": lambda x, i: augment.normalise(x, get_config().augment),
    "eval_inputs": lambda x, i: augment.eval_inputs(x, get_config("rcc.eval_size=48")),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_gives_the_same_with_and_without_jit(name):
    images, which = jnp.asarray(make_images(3)), jnp.array([3, 6, 4])
    jitted, plain = jax.jit(FUNCTIONS[name])(images, which), FUNCTIONS[name](images, which)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=0.01), jitted, plain)


def test_augment_applies_its_steps_in_the_documented_order():
    """Compares with flips, windows and stains, called one by one with the keys of `augment`."""
    config = make_config(**AUGMENTATIONS["all"])
    images, key = jnp.asarray(make_images(3)), jax.random.key(5)
    turn, window, stain = jax.random.split(key, 3)
    expected = augment.random_symmetry(turn, images)
    expected, inside = augment.random_center_crop(window, expected, config.rcc)
    expected = augment.stain_jitter(stain, expected, 0.2, 0.05)
    expected = np.where(inside, augment.normalise(expected, config.augment), 0.0)
    np.testing.assert_allclose(augment.augment(key, images, config), expected, atol=1e-4)


@pytest.mark.parametrize(("fill", "level"), [("mean", None), ("white", 255)])
def test_pixels_around_a_window_are_filled_with_the_mean_or_white(fill, level):
    fields = {"rcc.enabled": True, "rcc.min_size": 32, "rcc.max_size": 48, "rcc.fill": fill}
    config = make_config(**OFF | fields)
    mean, std = np.array(config.augment.mean), np.array(config.augment.std)
    black = np.zeros((20, 96, 96, 3), np.uint8)
    x = np.asarray(augment.augment(jax.random.key(0), jnp.asarray(black), config))
    window = np.isclose(x, -mean / std, atol=1e-5).all(-1)
    around = 0.0 if level is None else (level / 255 - mean) / std
    np.testing.assert_allclose(x[~window], np.broadcast_to(around, (np.sum(~window), 3)), atol=1e-5)
    sides = np.sqrt(window.sum((1, 2)))
    assert (sides == sides.round()).all()
    assert sides.min() >= 32
    assert len(set(sides)) > 5


def test_white_background_stays_white_when_only_stain_factors_are_jittered():
    white = jnp.full((4, 8, 8, 3), 255, jnp.uint8)
    np.testing.assert_allclose(
        augment.stain_jitter(jax.random.key(0), white, 0.5, 0.0), 255, atol=0.01
    )
