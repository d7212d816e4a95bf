"""Finds the annotation of a slide by its name."""

import re
from pathlib import Path

import tifffile

from bef_jax.errors import UserError, reason_of

# What follows the slide's name in the names of CAMELYON16's masks.
_MASK = re.compile(r"_(?:evaluation_)?mask\.tiff?$")
POLYGONS = (".xml", ".geojson", ".geojson.gz", ".json", ".json.gz")
MANY_USES = (".json", ".json.gz")  # files of other kinds have these suffixes, too
MASKS = (".tif", ".tiff")


def find_annotation(folder: Path, name: str, slide: Path | None = None) -> Path | None:
    """Returns the annotation of a slide in a folder, or None.

    It is NAME.xml, NAME.geojson, NAME.json (or either with .gz), NAME_mask.tif,
    NAME_evaluation_mask.tif or NAME.tif, or a .tiff, in upper or lower case. A TIFF without _mask
    counts only if it has one channel, because the slide itself may lie there.

    Args:
        folder: searched for files, without folders in it.
        name: the slide's file without suffix. One with folders, such as case1/a, is looked up as
            folder/case1/a, and then as folder/a.
        slide: a file that is not an annotation.

    Raises:
        UserError: there are several, or the folder cannot be read.
    """
    places = dict.fromkeys([folder / Path(name).parent, folder])
    for place in places:
        found = [file for file in _candidates(place, Path(name).name) if not _same(file, slide)]
        if len(found) > 1:
            names = " and ".join(file.name for file in found[:2])
            raise UserError(f"{place}: {names} are both annotations of {name}; keep one of them")
        if found:
            return found[0]
    return None


def annotated_names(folder: Path) -> set[str]:
    """Returns the names of slides whose annotations are in a folder, without folders in it.

    A TIFF without _mask does not count here, because it may be a slide, and neither does .json.
    """
    found = set()
    for file in _files(folder):
        name = file.name.casefold()
        mask = _MASK.search(name)
        ending = mask[0] if mask else next(filter(name.endswith, POLYGONS), None)
        if ending and ending not in MANY_USES:
            found.add(file.name[: -len(ending)])
    return found


def is_called_mask(file: Path) -> bool:
    """Returns whether a file has the name of a mask, which no slide has."""
    return bool(_MASK.search(file.name.casefold()))


def _candidates(folder: Path, name: str) -> list[Path]:
    own = [file for file in _files(folder) if file.name.casefold().startswith(name.casefold())]
    return [file for file in own if _is_annotation(file, file.name[len(name) :].casefold())]


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({reason_of(error)})") from error


def _is_annotation(file: Path, rest: str) -> bool:
    """Returns whether a file is an annotation, by what follows the slide's name in its name."""
    if not file.is_file():
        return False
    return rest in POLYGONS or bool(_MASK.fullmatch(rest)) or (rest in MASKS and _is_grey(file))


def _is_grey(file: Path) -> bool:
    try:
        with tifffile.TiffFile(file) as tiff:
            return tiff.pages.first.samplesperpixel == 1
    except Exception:  # tifffile raises anything at a damaged file, which then is no mask
        return False


def _same(file: Path, slide: Path | None) -> bool:
    return slide is not None and slide.exists() and file.samefile(slide)
