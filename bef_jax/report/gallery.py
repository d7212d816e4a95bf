"""The patches where a network is most confident, right or wrong, with what it looked at."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bef_jax.scoring.class_names import drawn_name, font_file
from bef_jax.scoring.metrics import Evaluation

SHOWN = 6  # patches of each kind
MISTAKES, RIGHT = "mistakes", "right"  # kinds of patches of more than two classes
_MOST_RIGHT = 24  # patches of the second kind
_COVER = 0.7  # opacity of a heat map where it is hottest
_GAP = 4  # pixels between a patch and its heat map
_WHITE, _BLACK = 255, 0
_PER_ROW, _FRAME = 4, 6  # patches, and pixels of white around each, in most_wrong.png
_CONTACT_SIDE = 192  # pixels; to which most_wrong.png enlarges patches that are smaller
_TEXT, _LINE = 15, 22  # pixels: the size of a caption's letters, and the height of its line
_SMALL_TEXT = 13  # of captions that name classes

# Takes patches, uint8 [n, S, S, 3], and the class that each is called, int [n]. Returns Grad-CAM
# maps [n, S, S] (`gradcam.make_explainer`).
Explain = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ShownPatch:
    """A patch of the gallery.

    Attributes:
        kind: such as "false positives".
        probability: of class 1 if there are two classes, otherwise of the called class.
        pixels: uint8 [S, S, 3], or [S, 2 S + 4, 3] with its heat map at the right.
        in_centre: share of the attribution in the square that decides the label; None without such
            a square or a map, or if the map is 0 everywhere.
        names: of its class and of the called class; None if there are two classes.
    """

    kind: str
    id: str
    probability: float
    pixels: np.ndarray
    in_centre: float | None
    names: tuple[str, str] | None = None

    @property
    def is_wrong(self) -> bool:
        """Returns whether the patch is called another class than its own."""
        return self.names[0] != self.names[1] if self.names else self.kind.startswith("false")

    @property
    def caption(self) -> str:
        """Returns its kind or its classes, and its probability."""
        if self.names:
            own, called = (drawn_name(name) or "?" for name in self.names)
            return f"p = {self.probability:.3f}\n{own}\ncalled {called}"
        return f"{self.kind.removesuffix('s')}, p = {self.probability:.3f}"


def pick(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Returns the indices of the most confident patches by kind, the most confident first."""
    probabilities = np.asarray(evaluation.probabilities)
    called = probabilities >= evaluation.metrics["threshold"]
    positive = np.asarray(evaluation.labels) == 1
    return {
        "false positives": _top(np.flatnonzero(called & ~positive), probabilities),
        "false negatives": _top(np.flatnonzero(~called & positive), -probabilities),
        "true positives": _top(np.flatnonzero(called & positive), probabilities),
        "true negatives": _top(np.flatnonzero(~called & ~positive), -probabilities),
    }


def pick_of_many(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Returns indices as `pick` does, for more than two classes.

    The kinds are the mistakes, and those of each class that are called so. Of many classes, those
    with the most such patches are shown, so that the gallery stays as small as that of two.
    """
    probabilities, labels = evaluation.probabilities, evaluation.labels
    called, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    right = np.bincount(labels[called == labels], minlength=len(evaluation.classes))
    shown = np.sort(np.argsort(-right, kind="stable")[:_MOST_RIGHT])
    each = min(SHOWN, _MOST_RIGHT // len(shown))
    of_classes = (np.flatnonzero((called == number) & (labels == number)) for number in shown)
    return {
        MISTAKES: _top(np.flatnonzero(called != labels), confidence, 2 * SHOWN),
        RIGHT: np.concatenate([_top(indices, confidence, each) for indices in of_classes]),
    }


def _top(indices: np.ndarray, confidence: np.ndarray, count: int = SHOWN) -> np.ndarray:
    # A stable sort keeps ties in the order of the split, so that every report shows the same.
    return indices[np.argsort(-confidence[indices], kind="stable")[:count]]


def show(
    evaluation: Evaluation, images: Any, explain: Explain | None, center: int = 0
) -> list[ShownPatch]:
    """Returns the gallery of one split.

    Args:
        images: indexable, uint8 [N, S, S, 3] in the order of the evaluation; only the patches
            that are shown are read.
        explain: see `Explain`; without it there are no heat maps.
        center: side of the square that decides the label; 0: there is none.
    """
    is_binary = evaluation.probabilities.ndim == 1
    picked = pick(evaluation) if is_binary else pick_of_many(evaluation)
    kinds = [(kind, int(index)) for kind, found in picked.items() for index in found]
    if not kinds:
        return []
    rows = [index for _, index in kinds]
    patches = images[rows]
    probabilities, called, names = _decisions(evaluation, rows)
    maps = explain(patches, called) if explain else [None] * len(kinds)
    return [
        ShownPatch(
            kind,
            id=str(evaluation.ids[row]),
            probability=float(probability),
            pixels=_draw(patch, heat, center),
            in_centre=None if heat is None else central_share(heat, center),
            names=pair,
        )
        for (kind, row), probability, patch, heat, pair in zip(
            kinds, probabilities, patches, maps, names, strict=True
        )
    ]


def _decisions(
    evaluation: Evaluation, rows: list[int]
) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str] | None]]:
    """Returns the probability, the called class, and the names (`ShownPatch`) of each row."""
    found = np.asarray(evaluation.probabilities)[rows]
    if found.ndim == 1:
        return found, (found >= evaluation.metrics["threshold"]).astype(int), [None] * len(rows)
    called, classes = found.argmax(axis=1), evaluation.classes
    pairs = zip(evaluation.labels[rows], called, strict=True)
    return found.max(axis=1), called, [(classes[label], classes[each]) for label, each in pairs]


def _draw(patch: np.ndarray, heat: np.ndarray | None, center: int) -> np.ndarray:
    framed = with_square(patch, center)
    if heat is None:
        return framed
    gap = np.full((len(patch), _GAP, 3), _WHITE, np.uint8)
    return np.hstack([framed, gap, with_square(with_heat_map(patch, heat), center)])


def with_heat_map(patch: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Returns a patch under its heat map, uint8; hotter places are covered more."""
    # Scale by each map's own peak, because a wide map of the same sum would hardly show. A map of 0
    # stays 0.
    level = heat / max(float(heat.max()), np.finfo(np.float32).tiny)
    colour = matplotlib.colormaps["viridis"](level)[..., :3] * 255
    opacity = (_COVER * level)[..., None]
    return (patch * (1 - opacity) + colour * opacity).round().astype(np.uint8)


def central_share(heat: np.ndarray, center: int) -> float | None:
    """Returns the share of a map [S, S] in its central square of side `center`.

    It is None without a square, or if the map is 0.
    """
    total = float(heat.sum())
    if not center or total <= 0:
        return None
    middle = slice(*_ends(len(heat), center))
    return float(heat[middle, middle].sum()) / total


def _ends(side: int, center: int) -> tuple[int, int]:
    """Returns the first row of the central square, and the row after its last one."""
    margin = (side - center) // 2
    return margin, margin + center


def with_square(patch: np.ndarray, center: int) -> np.ndarray:
    """Returns a copy with the deciding square outlined, white in black, to show on any tissue.

    A square that leaves no room for the outline is the whole patch, and gets none.
    """
    patch = patch.copy()
    low, high = _ends(len(patch), center)
    if not center or low < 2:
        return patch
    for colour, first, last in ((_BLACK, low - 2, high + 1), (_WHITE, low - 1, high)):
        patch[[first, last], first : last + 1] = colour
        patch[first : last + 1, [first, last]] = colour
    return patch


def contact_sheet(shown: list[ShownPatch]) -> np.ndarray:
    """Returns the misclassified patches in rows of four, uint8 [H, W, 3]; all if there are none."""
    wrong = [each for each in shown if each.is_wrong] or shown
    tiles = [_captioned(each) for each in wrong]
    # White tiles fill the last row.
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % _PER_ROW)
    rows = [np.hstack(tiles[i : i + _PER_ROW]) for i in range(0, len(tiles), _PER_ROW)]
    return np.vstack(rows)


def _captioned(each: ShownPatch) -> np.ndarray:
    """Returns a tile above its caption, on white, uint8 [H, W, 3]."""
    # Use a whole factor and no smoothing, so that the square's line is equally thick everywhere.
    zoom = max(1, _CONTACT_SIDE // len(each.pixels))
    pixels = each.pixels.repeat(zoom, 0).repeat(zoom, 1)
    frame = [(_FRAME, _LINE * len(each.caption.splitlines())), (_FRAME, _FRAME), (0, 0)]
    image = Image.fromarray(np.pad(pixels, frame, constant_values=255))
    place, font = (_FRAME, _FRAME + len(pixels)), ImageFont.load_default(_TEXT)
    if each.names:  # these may have letters that Pillow's own font lacks
        font = ImageFont.truetype(font_file(), _SMALL_TEXT)
    ImageDraw.Draw(image).text(place, each.caption, fill="black", font=font)
    return np.asarray(image)
