"""Nine kinds of H&E-like tissue, drawn: a data set of nine classes for tests and results.

The kinds and their short names are those of NCT-CRC-HE-100K (Kather et al. 2018), so that a command
for one works for the other. Nothing of that set is in here: all is drawn, at its 0.5 micrometres
per pixel. A score on these pictures says nothing about tissue.

Each kind draws the amounts of two stains, haematoxylin (nuclei) and eosin (the rest), as arrays
[S, S]. Beer-Lambert's law turns them into colour. A patient has stains of its own, so the colour
says little about the kind: its mean alone gives a macro AUC of 0.92. The textures decide.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

# Optical density of red, green and blue for one unit of each stain (Macenko et al. 2009).
STAINS = np.array([[0.563, 0.720, 0.406], [0.216, 0.801, 0.558]], np.float32)
MARGIN = 24  # pixels around the drawing, so that a nucleus at the border needs no test
ANGLES = 24  # directions of the nuclei in a bank, over half a turn
SHAPES = 4  # nuclei of each direction


class Canvas:
    """The stains of one picture while it is drawn.

    Attributes:
        rng: draws everything.
        side: of the picture, in pixels.
        nuclei: haematoxylin of nuclei, float32 [side + 2 * MARGIN] squared.
    """

    def __init__(self, rng: np.random.Generator, side: int):
        """Begins without nuclei."""
        self.rng, self.side = rng, side
        width = side + 2 * MARGIN
        self.nuclei = np.zeros((width, width), np.float32)

    def noise(self, length: float) -> np.ndarray:
        """Returns smooth noise of unit scale, [S, S], whose grains are `length` pixels large."""
        weights = _interpolation(self.side, length)
        values = self.rng.standard_normal((weights.shape[1],) * 2, dtype=np.float32)
        return weights @ values @ weights.T

    def stamp(self, kind: str, centers: np.ndarray, angles: np.ndarray | float | None = None):
        """Paints nuclei of a kind at centers [n, 2] (row, column); the darker one of two shows.

        Args:
            angles: [n], in radians, of their long axes; None: any.
        """
        if angles is None:
            angles = self.rng.uniform(0, np.pi, len(centers))
        turns = np.broadcast_to(
            np.rint(angles * (ANGLES / np.pi)).astype(int) % ANGLES, len(centers)
        )
        shapes = self.rng.integers(0, SHAPES, len(centers))
        bank = _bank(kind)
        reach = bank.shape[-1] // 2
        corners = np.rint(centers).astype(int) + MARGIN - reach
        width = len(self.nuclei) - bank.shape[-1]
        inside = ((corners >= 0) & (corners <= width)).all(1)
        for (y, x), turn, shape in zip(corners[inside], turns[inside], shapes[inside], strict=True):
            place = self.nuclei[y : y + 2 * reach + 1, x : x + 2 * reach + 1]
            np.maximum(place, bank[turn, shape], out=place)

    def scattered(self, density: float) -> np.ndarray:
        """Returns random centers [n, 2], `density` of them in 100x100 pixels on average."""
        n = self.rng.poisson(density * (self.side / 100) ** 2)
        return self.rng.uniform(-8, self.side + 8, (n, 2))

    def packed(self, spacing: float, jitter: float) -> np.ndarray:
        """Returns the centers [n, 2] of a hexagonal grid, each moved by jitter * spacing or so."""
        count = int(self.side / spacing) + 4
        y, x = np.mgrid[:count, :count].astype(float)
        grid = np.stack([y * 0.87, x + y % 2 / 2], -1).reshape(-1, 2) * spacing
        turn = self.rng.uniform(0, np.pi / 3)
        grid -= spacing * count / 2 * np.array([0.87, 1])
        # Turn a grid that covers the picture from corner to corner.
        grid = np.concatenate([grid, grid + [0, spacing * count], grid - [0, spacing * count]])
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        grid = grid @ rotation + self.side / 2 + self.rng.uniform(-spacing, spacing, 2)
        grid += self.rng.normal(0, jitter * spacing, grid.shape)
        # Keep those beyond the border whose cells or glands reach into the picture.
        return grid[((grid > -spacing) & (grid < self.side + spacing)).all(1)]


def at(field: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Returns a field's values [n] at centers [n, 2], which may lie a little outside."""
    y, x = np.clip(np.rint(centers).astype(int), 0, len(field) - 1).T
    return field[y, x]


@functools.cache
def _interpolation(side: int, length: float) -> np.ndarray:
    """Returns the float32 matrix [side, knots] that interpolates between knots `length` apart."""
    knots = int(np.ceil(side / length)) + 3
    place = 1 + np.arange(side)[:, None] / length
    weights = np.exp(-((place - np.arange(knots)) ** 2) / (2 * 0.6**2))
    # Scale each row, so that values of unit variance give a sum of unit variance.
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)


# Radius in pixels, ratio of the axes, irregularity, stain, contrast of the chromatin, and how pale
# the inside is. Least and most of each.
NUCLEI = {
    "lymphocyte": ((5.0, 6.4), (1.0, 1.2), 0.03, (1.1, 1.6), 0.25, 0.0),
    "plasma": ((5.5, 7.0), (1.1, 1.5), 0.04, (0.8, 1.2), 0.3, 0.2),
    "fibroblast": ((4.0, 5.4), (3.0, 6.0), 0.06, (0.7, 1.2), 0.15, 0.1),
    "muscle": ((4.4, 5.4), (4.0, 8.0), 0.03, (0.5, 0.9), 0.15, 0.2),
    "epithelium": ((6.0, 7.2), (1.4, 1.9), 0.05, (0.8, 1.2), 0.2, 0.2),
    "tumour": ((7.5, 11.0), (1.0, 1.9), 0.10, (0.6, 1.3), 0.35, 0.4),
    "fragment": ((1.2, 3.2), (1.0, 1.8), 0.15, (0.8, 1.7), 0.1, 0.0),
}


@functools.cache
def _bank(kind: str) -> np.ndarray:
    """Returns haematoxylin of nuclei, float32 [ANGLES, SHAPES, R, R]; turn i is i * pi / ANGLES."""
    radius, ratio, irregularity, stain, grain, pale = NUCLEI[kind]
    # The generator depends on the kind alone, so that all pictures share a bank.
    rng = np.random.default_rng(sum(kind.encode()))
    reach = min(MARGIN, int(np.ceil(radius[1] * np.sqrt(ratio[1]))) + 3)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    shape = (ANGLES, SHAPES, 1, 1)
    turn = (np.arange(ANGLES) * np.pi / ANGLES)[:, None, None, None]
    stretch = np.sqrt(rng.uniform(*ratio, shape))
    # Pixels in coordinates of the nucleus, along its long and its short axis.
    long, short = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    distance, angle = np.hypot(long / stretch, short * stretch), np.arctan2(short, long)
    edge = rng.uniform(*radius, shape)
    for lobes in (2, 3, 5):
        phase = rng.uniform(0, 2 * np.pi, shape)
        edge = edge * (1 + irregularity * rng.normal(0, 1, shape) * np.cos(lobes * angle + phase))
    inside = 1 / (1 + np.exp(np.clip((distance - edge) / 0.6, -30, 30)))
    chromatin = ndimage.gaussian_filter(rng.normal(0, 1, (*shape[:2], *y.shape)), (0, 0, 1.2, 1.2))
    chromatin = 1 + 4 * grain * chromatin - pale * np.exp(-((distance / (0.7 * edge)) ** 4))
    # The membrane is darker, which separates neighbours.
    chromatin += 0.3 * np.exp(-(((distance - edge + 1) / 1.2) ** 2))
    return (inside * rng.uniform(*stain, shape) * np.clip(chromatin, 0.3, 1.8)).astype(np.float32)


# ---- the kinds: each returns the haematoxylin that is not of nuclei, and the eosin ---------------


def adipose(c: Canvas):
    """Draws large empty fat cells with thin walls."""
    near, next_near = _distances(c, c.packed(c.rng.uniform(60, 110), 0.2))
    gap = next_near - near + 2 * c.noise(25)
    wall = np.exp(-((gap / c.rng.uniform(4, 8)) ** 2))
    corner = np.clip(wall * np.clip(0.6 * c.noise(45), 0, 1.5), 0, 1)
    centers = c.scattered(12)
    c.stamp("fibroblast", centers[at(wall, centers) > 0.6])
    return 0.08 * wall, 0.03 + wall * (0.45 + 0.1 * c.noise(6)) + 0.3 * corner


def background(c: Canvas):
    """Draws glass: nearly nothing, with dust, and sometimes an edge of tissue or a stain of dye."""
    haze = np.clip(0.03 + 0.03 * c.rng.random() * c.noise(70), 0, None)
    c.stamp("fragment", c.scattered(c.rng.uniform(0, 2.5)))
    c.nuclei *= c.rng.uniform(0.2, 0.6)
    dirt = np.clip(c.noise(50) - c.rng.uniform(1.0, 3.0), 0, 1) * (0.5 + 0.3 * c.noise(5))
    return haze + 0.1 * dirt * c.rng.random(), haze + 0.35 * np.clip(dirt, 0, None)


def debris(c: Canvas):
    """Draws necrosis: granular remains, dark fragments in clusters, ghosts of cells."""
    clusters = c.noise(30)
    centers = c.scattered(c.rng.uniform(60, 130))
    c.stamp("fragment", centers[at(clusters, centers) > 0.2])
    ghosts = c.scattered(14)
    c.stamp("plasma", ghosts)
    c.nuclei *= c.rng.uniform(0.6, 0.9)
    gaps = np.clip(1.5 * (c.noise(26) + 0.4 * c.noise(7) - c.rng.uniform(0.8, 2.0)), 0, 0.9)
    grain = 0.12 * c.noise(2.5) + 0.14 * c.noise(6) + 0.12 * c.noise(25)
    return (0.2 + 0.1 * clusters) * (1 - gaps), (0.5 + grain) * (1 - gaps)


def lymphocytes(c: Canvas):
    """Draws a sheet of small round dark nuclei with little around them."""
    centers = c.packed(c.rng.uniform(12.5, 16), 0.25)
    thin = c.noise(45) + c.rng.uniform(0.6, 2.0)
    c.stamp("lymphocyte", centers[at(thin, centers) > c.rng.uniform(-0.5, 0.3, len(centers))])
    c.stamp("plasma", c.scattered(8))
    fibres, _ = _fibres(c, 12, 5)
    return 0.12 + 0.03 * c.noise(8), np.clip(0.28 + 0.1 * c.noise(10) + 0.06 * fibres, 0.03, None)


def mucus(c: Canvas):
    """Draws pale pools with wisps and a few floating cells."""
    wisps = 0
    for length in (18, 34, 60):
        stream, _ = _fibres(c, length, length / 4)
        wisps = wisps + 0.33 * np.exp(-((stream / 0.5) ** 2))
    density = np.clip(0.5 + 0.5 * c.noise(55), 0.1, None) * c.rng.uniform(0.6, 2)
    c.stamp(c.rng.choice(["plasma", "fragment"]), c.scattered(c.rng.uniform(0, 5)))
    tint = c.rng.uniform(0.15, 0.4)
    return density * (0.1 + tint * wisps), density * (0.06 + (0.5 - tint) * wisps)


def muscle(c: Canvas):
    """Draws straight parallel fibres of even width with long pale nuclei along them."""
    fibres, direction = _fibres(c, c.rng.uniform(7, 12), 4, bend=c.rng.uniform(4, 14))
    clefts = np.clip(1.2 * (fibres - c.rng.uniform(1.2, 2.4)), 0, 0.85)
    centers = c.scattered(c.rng.uniform(6, 14))
    c.stamp("muscle", centers, at(direction, centers))
    pink = 0.62 + 0.1 * fibres + 0.05 * c.noise(4) + 0.08 * c.noise(60)
    return 0.08 * (1 - clefts), pink * (1 - clefts)


def mucosa(c: Canvas):
    """Draws round regular glands: a lumen, goblet cells, one row of nuclei; cells between them."""
    spacing = c.rng.uniform(78, 110)
    middles = c.packed(spacing, 0.07)
    radius = 0.43 * spacing
    near, _ = _distances(c, middles)
    place = (near + 2.5 * c.noise(18)) / radius
    gland, lumen = _below(place, 1, 0.05), _below(place, c.rng.uniform(0.08, 0.25), 0.06)
    goblets = _below(-c.noise(9), c.rng.uniform(0.0, 1.0), 0.2) * _below(place, 0.72, 0.04)
    between = c.scattered(c.rng.uniform(25, 50))
    between = between[at(place, between) > 1.12]
    for number, kind in enumerate(("plasma", "lymphocyte", "fibroblast")):
        c.stamp(kind, between[number::3])
    # A row of nuclei along each gland's border, pointing to its middle.
    turns = np.arange(0, 2 * np.pi, 12 / radius)
    turns = turns + c.rng.normal(0, 0.06, (len(middles), len(turns)))
    away = radius * (0.86 + c.rng.normal(0, 0.03, turns.shape))
    ring = middles[:, None] + away[..., None] * np.stack([np.sin(turns), np.cos(turns)], -1)
    ring, turns = ring.reshape(-1, 2), turns.ravel()
    fits = abs(at(place, ring) - 0.86) < 0.12
    c.stamp("epithelium", ring[fits], turns[fits])
    stroma = np.clip(0.4 + 0.1 * c.noise(6) + 0.1 * c.noise(20), 0.05, None)
    pink = (1 - gland) * stroma + gland * (0.42 + 0.06 * c.noise(5)) * (1 - 0.8 * goblets)
    blue = 0.07 + gland * (0.12 - 0.02 * goblets)
    return blue * (1 - 0.8 * lumen), pink * (1 - 0.85 * lumen)


def stroma(c: Canvas):
    """Draws wavy loose bundles of collagen with gaps and a few thin dark nuclei."""
    fibres, direction = _fibres(c, c.rng.uniform(9, 20), 5, bend=c.rng.uniform(22, 45))
    gaps = np.clip(1.2 * (0.7 * fibres + 0.7 * c.noise(22) - c.rng.uniform(0.7, 2.0)), 0, 0.92)
    centers = c.scattered(c.rng.uniform(8, 22))
    c.stamp("fibroblast", centers, at(direction, centers) + c.rng.normal(0, 0.15, len(centers)))
    c.stamp("lymphocyte", c.scattered(c.rng.uniform(0, 5)))
    pink = np.clip(0.5 + 0.14 * fibres + 0.12 * c.noise(35) + 0.04 * c.noise(3), 0.1, None)
    return 0.06 * (1 - gaps), pink * (1 - gaps)


def tumour(c: Canvas):
    """Draws crowded large irregular nuclei, in sheets or nests, with odd lumens between them."""
    nests = c.noise(c.rng.uniform(45, 75)) + 0.15 * c.noise(12)
    sheet = _below(-nests, c.rng.uniform(0.3, 1.6), 0.08)
    lumen = _below(-nests, -c.rng.uniform(1.0, 2.4), 0.08)
    centers = c.packed(c.rng.uniform(16, 21), 0.22)
    c.stamp("tumour", centers[(at(sheet, centers) > 0.5) & (at(lumen, centers) < 0.2)])
    between = c.scattered(30)
    between = between[at(sheet, between) < 0.3]
    c.stamp("fibroblast", between[::2])
    c.stamp("lymphocyte", between[1::2])
    fibres, _ = _fibres(c, 14, 5)
    loose = np.clip(0.42 + 0.12 * fibres, 0.05, None)
    cell = 0.45 + 0.08 * c.noise(7) + 0.05 * c.noise(25)
    pink = sheet * cell + (1 - sheet) * loose
    return (0.06 + 0.16 * sheet) * (1 - 0.9 * lumen), pink * (1 - 0.9 * lumen)


# The kinds by the names of their folders, and what each of them may have beside it.
KINDS: dict[str, Callable] = {
    "ADI": adipose, "BACK": background, "DEB": debris, "LYM": lymphocytes, "MUC": mucus,
    "MUS": muscle, "NORM": mucosa, "STR": stroma, "TUM": tumour,
}  # fmt: skip
BESIDE = {
    "ADI": ("STR", "MUS"), "BACK": ("STR", "MUC"), "DEB": ("TUM", "STR"), "LYM": ("STR", "ADI"),
    "MUC": ("STR", "TUM"), "MUS": ("STR", "LYM"), "NORM": ("STR", "LYM"), "STR": ("LYM", "MUS"),
    "TUM": ("STR", "DEB"),
}  # fmt: skip


def _below(values: np.ndarray, limit: float, softness: float) -> np.ndarray:
    """Returns 1 where values are below a limit and 0 where they are above, with a soft edge."""
    return 1 / (1 + np.exp(np.clip((values - limit) / softness, -30, 30)))


def _distances(c: Canvas, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pixel's distance to the nearest and to the next nearest of points [n, 2]."""
    # At a quarter of the resolution it takes a sixteenth of the time. The fields are smooth enough.
    y, x = np.mgrid[: c.side + 4 : 4, : c.side + 4 : 4].astype(np.float32)
    squares = (y - points[:, 0, None, None]) ** 2 + (x - points[:, 1, None, None]) ** 2
    near = np.sqrt(np.partition(squares, 1, axis=0)[:2])
    fine = np.arange(c.side) / 4
    low = fine.astype(int)
    part = (fine - low).astype(np.float32)
    for _ in range(2):  # rows, then columns
        near = near[:, low] * (1 - part)[:, None] + near[:, low + 1] * part[:, None]
        near = near.swapaxes(1, 2)
    return near[0], near[1]


def _fibres(c: Canvas, width: float, fine: float, bend: float = 25.0):
    """Returns a texture of fibres, [S, S] of unit scale, and their direction, in radians.

    Args:
        width, fine: of the fibres and of the threads in them, in pixels.
        bend: how far they leave a straight line, in pixels.
    """
    turn = c.rng.uniform(0, np.pi)
    y, x = np.mgrid[: c.side, : c.side].astype(np.float32)
    across = np.cos(turn) * y - np.sin(turn) * x + bend * c.noise(70) + 0.15 * bend * c.noise(22)
    slope_y, slope_x = np.gradient(across)
    values = 0.8 * _lookup(c, across, width) + 0.5 * _lookup(c, across, fine)
    return values + 0.35 * c.noise(9), np.arctan2(slope_x, -slope_y)


def _lookup(c: Canvas, across: np.ndarray, width: float) -> np.ndarray:
    """Returns smooth noise of one dimension, [S, S], at the places `across`."""
    place = (across - across.min()) * (2 / width)
    values = ndimage.gaussian_filter1d(c.rng.standard_normal(int(place.max()) + 2), 1.0)
    low = place.astype(int)
    part = place - low
    return (1.9 * (values[low] * (1 - part) + values[low + 1] * part)).astype(np.float32)


# ---- pictures -----------------------------------------------------------------------------------


class Patient:
    """How the slides of a patient look: stains, scanner and scale."""

    def __init__(self, rng: np.random.Generator):
        """Draws them."""
        strength = np.exp(rng.uniform(-0.6, 0.45, (2, 1)))
        self.stains = np.float32(STAINS * strength * rng.normal(1, 0.09, (2, 3)))
        self.light = np.float32(rng.uniform(215, 252) * rng.normal(1, 0.012, 3))
        self.scale = rng.choice([0.88, 0.94, 1.0, 1.06, 1.14])
        self.blur = rng.uniform(0.3, 0.9)


def draw(kind: str, side: int, rng: np.random.Generator, patient: Patient) -> np.ndarray:
    """Returns a picture of a kind in KINDS, uint8 [side, side, 3]."""
    drawn = int(np.ceil(side / patient.scale))
    stains = _stains_of(kind, drawn, rng)
    if rng.random() < 0.4:  # another kind covers a corner
        other = _stains_of(rng.choice(BESIDE[kind]), drawn, rng)
        part = _below(-Canvas(rng, drawn).noise(110), -rng.uniform(0.7, 1.6), 0.06)
        stains = stains * (1 - part) + other * part
    stains = ndimage.gaussian_filter(stains, (0, patient.blur, patient.blur), truncate=2.5)
    thickness = np.exp(rng.uniform(-0.4, 0.4, (2, 1, 1)))  # of the section, for each stain
    density = np.tensordot(thickness * stains, patient.stains, (0, 0))
    density += 0.025 * rng.standard_normal(density.shape[:2], dtype=np.float32)[..., None] + 0.02
    picture = np.uint8(patient.light * np.exp(-np.maximum(density, 0)))
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR))


def _stains_of(kind: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Returns haematoxylin and eosin, float32 [2, side, side]."""
    canvas = Canvas(rng, side)
    blue, pink = KINDS[kind](canvas)
    nuclei = canvas.nuclei[MARGIN:-MARGIN, MARGIN:-MARGIN]
    return np.maximum(np.stack([blue + nuclei, pink * (1 - 0.3 * np.minimum(nuclei, 1))]), 0)


def write_folder(
    where: Path,
    patches_per_class: int,
    side: int = 224,
    seed: int = 0,
    groups: int = 12,
    suffix: str = ".png",
) -> None:
    """Writes pictures as where/KIND/P<patient>_<number><suffix>, for the source image_folder.

    Every patient has patches of all kinds. `--config.data.group='(?P<group>P\\d+)_'` tells them. A
    picture depends on the seed, its kind, its number and the patient alone.
    """
    patients = [Patient(np.random.default_rng((seed, number))) for number in range(groups)]
    for label, kind in enumerate(KINDS):
        folder = Path(where) / kind
        folder.mkdir(parents=True)
        for number in range(patches_per_class):
            patient = number % groups
            rng = np.random.default_rng((seed, label, number))
            picture = Image.fromarray(draw(kind, side, rng, patients[patient]))
            file = folder / f"P{patient:02d}_{number:05d}{suffix}"
            picture.save(file, quality=92, compress_level=1)  # each format reads its own of the two
