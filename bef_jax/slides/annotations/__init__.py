"""Where tumour is in a slide, as people drew it: TIFF masks, ASAP's XML files and GeoJSON."""

from pathlib import Path

from bef_jax.slides.annotations import asap, geojson, masks
from bef_jax.slides.annotations.annotation import Annotation
from bef_jax.slides.annotations.find import (
    MANY_USES,
    MASKS,
    POLYGONS,
    annotated_names,
    find_annotation,
    is_called_mask,
)
from bef_jax.slides.annotations.reference import (
    LESION_CLASSES,
    SlideLabel,
    label_of,
    read_reference,
)

__all__ = [
    "LESION_CLASSES",
    "MANY_USES",
    "MASKS",
    "POLYGONS",
    "Annotation",
    "SlideLabel",
    "annotated_names",
    "find_annotation",
    "is_called_mask",
    "label_of",
    "read_annotation",
    "read_reference",
]


def read_annotation(path: Path, size: tuple[int, int]) -> Annotation:
    """Reads an annotation.

    Args:
        path: as `find_annotation` returns it. The suffix decides how it is read.
        size: the slide's width and height, in pixels of level 0.

    Raises:
        UserError: it cannot be read, or is not of this slide.
    """
    suffix = path.suffix.lower()
    if suffix in MASKS:
        return masks.read_mask(path, size)
    return asap.read_asap(path) if suffix == ".xml" else geojson.read_geojson(path)
