"""Facts about patches: their size, center, scale, classes and splits."""

from ml_collections import ConfigDict

PATCH = 96  # side of a patch, in pixels
CENTER = (32, 64)  # rows and columns of the region that decides a patch's label
CENTER_SIDE = CENTER[1] - CENTER[0]
IMAGE_SHAPE = (PATCH, PATCH, 3)
SPLITS = ("train", "valid", "test")
# Sources are read in this order. A patch in two splits is dropped from the one that is read later.
READ_ORDER = ("test", "valid", "train")

# Micrometres per pixel. PCam was cut at level 2 of CAMELYON16's slides. Two scanners made these at
# 0.243 and 0.226 um per pixel; 0.972 is the first one's. RPCam and TFDS hold the same patches.
_PCAM_MPP = 0.972
_OF_PCAM = ("pcam_hdf5", "rpcam", "tfds")
_PCAM_CLASSES = ("normal", "metastasis")


def mpp(config: ConfigDict) -> float | None:
    """Returns the micrometres per pixel of the patches that a network learned from.

    It is None if the source does not say.
    """
    return _PCAM_MPP if config.data.source in _OF_PCAM else None


def class_names(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the classes, in the order of their numbers in labels and logits."""
    count = config.model.num_classes
    return _PCAM_CLASSES if count == len(_PCAM_CLASSES) else tuple(map(str, range(count)))
