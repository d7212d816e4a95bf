"""Facts about patches: their size, center, classes and splits."""

from ml_collections import ConfigDict

PATCH = 96  # side of a patch, in pixels
CENTER = (32, 64)  # rows and columns of the region that decides a patch's label
CENTER_SIDE = CENTER[1] - CENTER[0]
IMAGE_SHAPE = (PATCH, PATCH, 3)
SPLITS = ("train", "valid", "test")
# Sources are read in this order. A patch in two splits is dropped from the one that is read later.
READ_ORDER = ("test", "valid", "train")
_PCAM_CLASSES = ("normal", "metastasis")


def class_names(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the classes, in the order of their numbers in labels and logits."""
    count = config.model.num_classes
    return _PCAM_CLASSES if count == len(_PCAM_CLASSES) else tuple(map(str, range(count)))
