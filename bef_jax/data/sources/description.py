"""What a source says about its patches, apart from the patches themselves."""

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

from bef_jax.data.patch import PCAM_CLASSES, SPLITS
from bef_jax.runtime.files import user_path

ONLY_SAME_FILES = "runs on the same files, and not with published scores"


@dataclasses.dataclass(frozen=True)
class Description:
    """What a reader should know about the patches of a source before believing a score.

    Attributes:
        shared_slides: whether its splits share slides, and what a score then means.
        comparable: what a score can be compared with.
        mpp: micrometres per pixel, or None if the source does not say.
        pcam_counts: patches of each split of PCam, before duplicates are dropped. A score on fewer
            patches cannot be compared with published ones. Empty if the splits are not PCam's.
    """

    shared_slides: str
    comparable: str
    mpp: float | None = None
    pcam_counts: Mapping[str, int] = dataclasses.field(default_factory=dict)


PCAM = Description(
    shared_slides="no: PCam's splits share no slide",
    comparable="published scores on PCam, and not with those on RPCam, whose split shares slides",
    # PCam was cut at level 2 of CAMELYON16's slides. Two scanners made these at 0.243 and 0.226 um
    # per pixel; 0.972 is the first one's.
    mpp=0.972,
    # The counts of TFDS's patch_camelyon 2.0.0.
    pcam_counts={"train": 262_144, "valid": 32_768, "test": 32_768},
)


def numbered_classes(data: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the classes, for a source whose labels are numbers."""
    return tuple(data.classes) or PCAM_CLASSES


def folder_identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide what is read, for a source in a folder."""
    sizes = {f"{split}_size": data[f"{split}_size"] for split in SPLITS}
    return {"dir": str(user_path(data.dir).resolve())} | sizes
