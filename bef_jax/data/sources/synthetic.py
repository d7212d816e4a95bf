"""Procedural H&E-like tissue with PatchCamelyon's label rule.

A patch is positive when its central 32x32 pixels hold tumour-like nuclei: larger, darker, more
irregular and more crowded than the rest. The same nuclei in the rim are a distractor, and are
equally likely in both classes. The rim is drawn before the label, so it says nothing about it.

Tissue is drawn as the amounts of two stains, haematoxylin (nuclei) and eosin (the rest).
Beer-Lambert's law turns these into colour, as for light through a slide.
"""

import functools
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from bef_jax.data.chunk import Begin, Chunk, Contents, counted, numbered, silent
from bef_jax.data.patch import PCAM_SIDE, READ_ORDER, SPLITS
from bef_jax.data.sources.description import Description, numbered_classes

# These give a valid AUC above 0.99 after three epochs of the quickstart, and are quick to draw.
DEFAULT_SIZES = {"train": 4096, "valid": 1024, "test": 1024}
BLOCK = 128  # patches drawn at once by one generator; small enough for the cache
STAMP = 19  # side of a drawn nucleus, odd
NUCLEUS_REACH = STAMP // 2  # pixels; a nucleus paints nothing farther from its center
# Distances of nuclei from the patch's center, in pixels. Deciding nuclei are at most CENTER_SPREAD
# away, so they lie inside the 32x32. Distractors are at least RIM_START away, so they lie outside.
CENTER_SPREAD = 16 - NUCLEUS_REACH
RIM_START = 17 + NUCLEUS_REACH
HALF_PATCH = PCAM_SIDE // 2  # where the rim ends
BANK_SIZE = 256  # different nuclei of each kind
# Optical density of red, green and blue for one unit of each stain (Macenko et al. 2009).
STAINS = np.array([[0.563, 0.720, 0.406], [0.216, 0.801, 0.558]], np.float32)

DESCRIPTION = Description(
    shared_slides="there are no slides: the patches are drawn; a score says nothing about tissue",
    comparable="runs on the same synthetic patches",
)


def identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide what is drawn."""
    # Keep their order, because a store's name lists them.
    return {f"{split}_size": size(data, split) for split in SPLITS} | {"seed": data.seed}


def size(data: ConfigDict, split: str) -> int:
    """Returns how many patches `split` has: data.<split>_size, or its default."""
    asked = data[f"{split}_size"]
    return DEFAULT_SIZES[split] if asked is None else asked


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source; its files are looked for when the first chunk is asked for, by `read`."""
    return Contents(read(data, begin), numbered_classes(data), DESCRIPTION.mpp)


def drawn_patches(side: int, count: int) -> np.ndarray:
    """Returns patches on which two forms of a network are compared, uint8 [count, side, side, 3].

    They are drawn tissue, and not noise, because a trained network is certain about noise. Even
    forms that differ would then agree.
    """
    images = next(generate("test", count, seed=0)).images
    # For smaller patches the middle is cut out. For larger ones mirror images are added.
    first, more = max(0, PCAM_SIDE - side) // 2, max(0, side - PCAM_SIDE)
    images = np.pad(images, [(0, 0), (0, more), (0, more), (0, 0)], "symmetric")
    return images[:, first : first + side, first : first + side]


def read(data: ConfigDict, begin: Begin = silent) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of the patches that `data`'s sizes and seed ask for."""
    for split in READ_ORDER:
        count = size(data, split)
        yield from counted(split, generate(split, count, data.seed), count, begin)


def generate(split: str, n: int, seed: int) -> Iterator[Chunk]:
    """Yields `n` patches of a split, in chunks of at most BLOCK.

    Patch i depends only on (split, seed, i), so a longer run begins with the shorter one. On
    another CPU, or with another BLAS, a few pixels in 10^8 come out brighter or darker by 1.
    """
    for start in range(0, n, BLOCK):
        # Each block has its own generator, so that it does not depend on the blocks before. The
        # last block is drawn whole and then cut, so that it does not depend on `n` either.
        entropy = [seed, READ_ORDER.index(split), start // BLOCK]
        images, labels = _draw(np.random.default_rng(np.random.SeedSequence(entropy)))
        count = min(BLOCK, n - start)
        ids = numbered(f"synthetic_{split}", slice(start, start + count))
        yield Chunk(images[:count], labels[:count], ids)


def _draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws BLOCK patches: uint8 [BLOCK, 96, 96, 3] and their labels uint8 [BLOCK]."""
    eosin, tissue = _draw_stroma(rng)
    nuclei = _draw_normal_nuclei(rng, tissue)
    _draw_rim_tumour(rng, nuclei)
    # Draw the label after everything outside the center, which then cannot depend on it. Keep the
    # order of draws, because it is part of what a seed means.
    labels = rng.integers(0, 2, BLOCK, dtype=np.uint8)
    _draw_central_tumour(rng, nuclei, labels)
    return _expose(rng, nuclei, eosin), labels


def _draw_stroma(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns eosin [BLOCK, 96, 96], and the share of tissue there, 0.08 in the white gaps."""
    fibres = _smooth_noise(rng, 9) + 0.6 * _smooth_noise(rng, 24) + 0.35 * _smooth_noise(rng, 48)
    # [BLOCK, 96, 96]. Each patch has its own share of gaps; some have none, as in slides.
    gaps = _smooth_noise(rng, 6) - rng.uniform(0.3, 2.5, (BLOCK, 1, 1)).astype(np.float32)
    tissue = 1 - np.clip(3 * gaps, 0, 0.92)
    return tissue * np.clip(0.42 + 0.13 * fibres, 0.05, None), tissue


def _smooth_noise(rng: np.random.Generator, knots: int) -> np.ndarray:
    """Returns noise [BLOCK, 96, 96] of unit scale, interpolated between knots x knots values."""
    weights = _interpolation(knots)
    values = rng.standard_normal((BLOCK, knots, knots), dtype=np.float32)
    # [96, knots] @ [BLOCK, knots, knots] @ [knots, 96]: it is separable, so two small products do.
    return weights @ values @ weights.T


@functools.cache
def _interpolation(knots: int) -> np.ndarray:
    """Returns the float32 matrix [96, knots] of a smooth interpolation on an even grid."""
    place = np.linspace(0, knots - 1, PCAM_SIDE)[:, None]
    weights = np.exp(-((place - np.arange(knots)) ** 2) / (2 * 0.6**2))
    # Scale each row, so that values of unit variance give a sum of unit variance.
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


def _draw_normal_nuclei(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """Returns haematoxylin of lymphocytes and stroma cells: [BLOCK, 114, 114], with its margin."""
    # The canvas has a margin, so that nuclei at the border need no test; it is cut off later.
    width = PCAM_SIDE + 2 * NUCLEUS_REACH
    canvas = np.zeros((BLOCK, width, width), np.float32)
    for kind, fewest, most in (("lymphocyte", 15, 75), ("stroma", 2, 12)):
        counts = rng.integers(fewest, most, BLOCK)
        centers = rng.uniform(0, PCAM_SIDE - 1, (BLOCK, most, 2))
        _stamp(rng, canvas, kind, counts, centers)
    inner = slice(NUCLEUS_REACH, NUCLEUS_REACH + PCAM_SIDE)
    canvas[:, inner, inner] *= tissue > 0.5  # no nuclei float in the gaps
    return canvas


def _draw_rim_tumour(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Adds one or two clusters of tumour nuclei to the rim of about 60% of the patches."""
    # Each cluster is in 37% of the patches, so one or both are in 1 - 0.63^2 = 60%. Without them
    # any tumour nucleus would tell the label, and a network would not learn to look at the center.
    for _ in range(2):
        side = rng.integers(0, 4, BLOCK)
        along_side = rng.uniform(-HALF_PATCH, HALF_PATCH, BLOCK)
        outwards = rng.uniform(RIM_START, HALF_PATCH, BLOCK)
        middle = np.stack([along_side, outwards], axis=-1)
        # Offsets from the center, (row, column). A swap and a sign turn one side into four.
        middle[side % 2 == 1] = middle[side % 2 == 1, ::-1]
        middle[side >= 2] *= -1
        offsets = middle[:, None] + rng.normal(0, 8, (BLOCK, 9, 2))
        # Push nuclei that are too near the center outwards, along their ray.
        distance = np.abs(offsets).max(axis=-1, keepdims=True)
        offsets *= np.maximum(1, RIM_START / distance)
        counts = rng.integers(3, 10, BLOCK) * (rng.random(BLOCK) < 0.37)
        _stamp(rng, canvas, "tumour", counts, _to_pixels(offsets))


def _draw_central_tumour(rng: np.random.Generator, canvas: np.ndarray, labels: np.ndarray) -> None:
    """Adds tumour nuclei to the central 32x32 of the patches whose label is 1."""
    # Centers lie in a smaller square, so that nuclei end inside the central 32x32.
    offsets = rng.uniform(-CENTER_SPREAD, CENTER_SPREAD, (BLOCK, 6, 2))
    _stamp(rng, canvas, "tumour", rng.integers(3, 7, BLOCK) * labels, _to_pixels(offsets))


def _to_pixels(offsets: np.ndarray) -> np.ndarray:
    """Turns offsets from the patch's center into pixels, kept within the patch."""
    return np.clip(offsets + (PCAM_SIDE - 1) / 2, 0, PCAM_SIDE - 1)


def _stamp(
    rng: np.random.Generator,
    canvas: np.ndarray,
    kind: str,
    counts: np.ndarray,
    centers: np.ndarray,
) -> None:
    """Paints counts[i] nuclei of a kind on canvas[i], at centers[i, :counts[i]] (row, column).

    Where nuclei overlap, the darker one shows.
    """
    choice = rng.integers(0, BANK_SIZE, centers.shape[:2])
    corners = np.rint(centers).astype(int)  # on the canvas, whose margin is NUCLEUS_REACH
    span = np.arange(STAMP)
    # Each turn paints at most one nucleus per patch, on all patches at once. NumPy would keep only
    # one of several values that are assigned to the same place.
    for k in range(centers.shape[1]):
        patches = np.flatnonzero(counts > k)
        rows = corners[patches, k, 0][:, None, None] + span[:, None]
        columns = corners[patches, k, 1][:, None, None] + span
        place = (patches[:, None, None], rows, columns)
        canvas[place] = np.maximum(canvas[place], _bank(kind)[choice[patches, k]])


@functools.cache
def _bank(kind: str) -> np.ndarray:
    """Returns BANK_SIZE nuclei of a kind: haematoxylin, float32 [BANK_SIZE, STAMP, STAMP]."""
    radius, elongation, irregularity, stain, grain = {
        "lymphocyte": ((3.0, 4.2), (1.0, 1.25), 0.04, (0.75, 1.25), 0.15),
        "stroma": ((2.6, 3.4), (1.8, 2.6), 0.05, (0.6, 1.0), 0.15),
        "tumour": ((4.8, 6.6), (1.0, 1.35), 0.1, (1.25, 1.8), 0.3),
    }[kind]
    # The generator depends on the kind, not on the seed, so all data sets share a bank. Only their
    # composition differs. Do not use hash(), because Python salts it in each process.
    rng = np.random.default_rng(sum(kind.encode()))
    column = (BANK_SIZE, 1, 1)
    y, x = np.mgrid[-NUCLEUS_REACH : NUCLEUS_REACH + 1, -NUCLEUS_REACH : NUCLEUS_REACH + 1]
    # [BANK_SIZE, 1, 1] is broadcast against [STAMP, STAMP]: all nuclei of a bank at once.
    turn, stretch = rng.uniform(0, np.pi, column), np.sqrt(rng.uniform(*elongation, column))
    # Pixels in coordinates of the nucleus, along its major and its minor axis.
    major, minor = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    distance, angle = np.hypot(major / stretch, minor * stretch), np.arctan2(minor, major)
    edge = rng.uniform(*radius, column)
    for lobes in (2, 3, 5):
        phase = rng.uniform(0, 2 * np.pi, column)
        edge = edge * (1 + irregularity * rng.normal(0, 1, column) * np.cos(lobes * angle + phase))
    # The edge is soft, as through a lens. The clip keeps exp from overflowing.
    inside = 1 / (1 + np.exp(np.clip((distance - edge) / 0.45, -30, 30)))
    inside *= np.maximum(abs(x), abs(y)) < NUCLEUS_REACH  # leaves the stamp's border empty
    # Add coarse grains of chromatin, and a darker membrane that tells neighbours apart.
    chromatin = 0.85 + grain * _smooth(rng.normal(0, 1, (BANK_SIZE, STAMP, STAMP)))
    chromatin += 0.35 * np.exp(-(((distance - edge + 1) / 0.9) ** 2))
    return (inside * rng.uniform(*stain, column) * np.clip(chromatin, 0.4, 1.6)).astype(np.float32)


def _smooth(noise: np.ndarray) -> np.ndarray:
    """Averages each value of [..., H, W] with its neighbours on a torus, keeping the variance."""
    rows = noise + 0.6 * (np.roll(noise, 1, -2) + np.roll(noise, -1, -2))
    both = rows + 0.6 * (np.roll(rows, 1, -1) + np.roll(rows, -1, -1))
    return both / (1 + 2 * 0.6**2)


def _expose(rng: np.random.Generator, canvas: np.ndarray, eosin: np.ndarray) -> np.ndarray:
    """Returns the colour of stained tissue: uint8 [BLOCK, 96, 96, 3]."""
    inner = slice(NUCLEUS_REACH, NUCLEUS_REACH + PCAM_SIDE)
    grain = rng.standard_normal(eosin.shape, dtype=np.float32)
    # Slides differ in how strong and how pure each stain is.
    strength = rng.uniform(0.7, 1.3, (BLOCK, 2, 1)).astype(np.float32)
    purity = rng.normal(1, 0.06, (BLOCK, 2, 3)).astype(np.float32)
    stains = STAINS * strength * purity
    # A little haematoxylin lies over all tissue.
    nuclei = canvas[:, inner, inner] + 0.12 * eosin
    density = np.stack([nuclei, eosin], axis=-1).reshape(BLOCK, -1, 2) @ stains
    density += 0.02 * grain.reshape(BLOCK, -1, 1) + 0.03
    # A density below 0 would give light above 255, which would wrap around in uint8.
    light = 255 * np.exp(-np.maximum(density, 0))
    return light.astype(np.uint8).reshape(BLOCK, PCAM_SIDE, PCAM_SIDE, 3)
