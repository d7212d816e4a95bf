"""Slides and their annotations, of which patches are drawn by the rule of PCam.

A patch is positive if the square in its middle has a pixel of tumour. Each class has half of the
patches, and each slide of a split gives equally many of a class, as far as it has them.
"""

from pathlib import Path

from ml_collections import ConfigDict

from bef_jax.data.chunk import Begin, Contents, silent
from bef_jax.data.patch import SPLITS
from bef_jax.data.sources.description import (
    ONLY_SAME_FILES,
    PCAM,
    Description,
    folder_identity,
    numbered_classes,
)
from bef_jax.runtime.files import user_path

DESCRIPTION = Description(
    shared_slides="no: each slide is in one split",
    comparable=ONLY_SAME_FILES,
    mpp=PCAM.mpp,
)
# What decides which patches are drawn, in addition to the folder and sizes.
_FIELDS = ("patch_size", "group", "annotations", "slide_patches", "slide_mpp", "slide_center")


def identity(data: ConfigDict) -> dict:
    """Returns the fields of `config.data` that decide what is read, and a checksum of the files.

    Annotations are edited more often than they get other names.
    """
    fields = {name: data[name] for name in (*_FIELDS, "seed")}
    lists = {"classes": list(data.classes), "split_ratio": list(data.split_ratio)}
    given = dict.fromkeys(filter(None, (data.dir, data.annotations)))
    folders = [folder for each in given if (folder := user_path(each)).is_dir()]
    files = {"table": found} if (found := _checksum(folders)) else {}
    return folder_identity(data) | fields | lists | {"mpp": data.mpp or PCAM.mpp} | files


def _checksum(folders: list[Path]) -> str | None:
    if not folders:  # without them, the libraries that read files are not imported
        return None
    from bef_jax.data.sources.slides.files import checksum

    return checksum(folders)


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source: finds all slides, and reads their headers and annotations.

    Raises:
        UserError: a slide or annotation is refused, an annotation is of no slide, there is no
            tumour or no normal tissue, or the slides cannot be divided into splits.
    """
    from bef_jax.data.sources.slides.division import divide, quotas
    from bef_jax.data.sources.slides.drawing import Drawing
    from bef_jax.data.sources.slides.finding import find_all
    from bef_jax.data.sources.slides.survey import survey_all

    mpp = data.mpp or PCAM.mpp
    surveys = survey_all(find_all(data, mpp), data, mpp, begin)
    splits = divide(data, surveys)
    drawing = Drawing(data, splits, quotas(data, [name for name in SPLITS if name in splits]))
    return Contents(drawing.chunks(begin), numbered_classes(data), mpp, drawing.tables)
