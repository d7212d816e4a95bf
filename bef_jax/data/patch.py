"""What a patch is: its side, the region that decides its label, its scale, classes and splits."""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

PCAM_SIDE = 96  # side of PCam's patches, in pixels
PCAM_CENTER = 32  # side of the region in the middle that decides their labels
PCAM_CLASSES = ("normal", "metastasis")
SPLITS = ("train", "valid", "test")
# Sources are read in this order. A patch in two splits is dropped from the one that is read later.
READ_ORDER = ("test", "valid", "train")
SAME_SCALE = 1.08  # ratio of two scales; PCam's own two scanners differ by 7.5 %


class Tiling(NamedTuple):
    """How a picture that is larger than a patch is cut into tiles.

    Attributes:
        side: of a tile, in pixels, which is that of the network's patches.
        center: side of the square in the middle of a tile that decides its label, in pixels.
        stride: pixels from one square to the next.
    """

    side: int
    center: int
    stride: int


def train_side(config: ConfigDict) -> int:
    """Returns the side of the network's input in training, in pixels."""
    return config.rcc.max_size if config.rcc.enabled else config.data.patch_size


def eval_side(config: ConfigDict) -> int:
    """Returns the side of the network's input in evaluation, in pixels."""
    return config.rcc.eval_size if config.rcc.enabled else config.data.patch_size


def deciding_side(config: ConfigDict) -> int:
    """Returns the side of the square in the middle of a patch that decides its label, in pixels."""
    return config.rcc.center or config.data.patch_size


def tiling(config: ConfigDict) -> Tiling:
    """Returns how pictures are cut; without predict.stride, squares lie side by side."""
    center = deciding_side(config)
    return Tiling(config.data.patch_size, center, config.predict.stride or center)


def class_names(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the classes, in the order of their numbers in labels and logits."""
    count = config.model.num_classes
    if config.data.classes:
        return tuple(config.data.classes)
    return PCAM_CLASSES if count == len(PCAM_CLASSES) else tuple(map(str, range(count)))


def same_classes(saved: ConfigDict, config: ConfigDict) -> bool:
    """Returns whether the labels of a saved network and of `config` mean the same.

    An imported network may not know the names of its classes. Then their number is enough.
    """
    is_unnamed = not saved.data.classes and saved.model.num_classes != len(PCAM_CLASSES)
    if is_unnamed:
        return saved.model.num_classes == config.model.num_classes
    return class_names(saved) == class_names(config)


def label_dtype(classes: int) -> np.dtype:
    """Returns the smallest type that holds the labels of so many classes."""
    return np.min_scalar_type(classes - 1)


def same_scale(mpp: float, other: float) -> bool:
    """Returns whether two scales, in micrometres per pixel, are near enough to count as one."""
    return 1 / SAME_SCALE <= mpp / other <= SAME_SCALE
