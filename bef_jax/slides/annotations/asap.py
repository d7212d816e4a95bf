"""Reads polygons from the XML files of ASAP, which CAMELYON16 and CAMELYON17 have."""

import logging
from pathlib import Path
from xml.parsers import expat

from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file
from bef_jax.slides.annotations.polygons import Polygons, Shape, is_tumour, make_shape

LOG = logging.getLogger(__name__)
_ROOT = "ASAP_Annotations"


def read_asap(path: Path) -> Polygons:
    """Reads the polygons, splines and rectangles of an ASAP file.

    The points of a spline are taken as the corners of a polygon. Points and other kinds are left
    out, with a warning that says how many they are.

    Raises:
        UserError: it is not such a file, or a group or a number in it is wrong.
    """
    content = _Content(path)
    parser = expat.ParserCreate()
    parser.StartElementHandler = content.start
    parser.EndElementHandler = content.end
    parser.StartDoctypeDeclHandler = content.refuse_doctype
    try:
        with open_user_file(path) as stream:
            parser.ParseFile(stream)
    except UserError:
        raise
    except (OSError, ValueError, LookupError, expat.ExpatError) as error:  # or its encoding
        raise UserError(f"{path}: cannot be read as XML ({reason_of(error)})") from error
    if content.left_out:
        LOG.warning("%s: %d annotations have no area and are left out", path, content.left_out)
    return Polygons(path, content.tumour, content.excluded)


class _Content:
    """What was read so far.

    Attributes:
        tumour: shapes of tumour.
        excluded: shapes that are cut out of it.
        left_out: number of annotations of other kinds.
    """

    def __init__(self, path: Path) -> None:
        self.tumour: list[Shape] = []
        self.excluded: list[Shape] = []
        self.left_out = 0
        self._path, self._count, self._has_root = path, 0, False
        self._attributes: dict[str, str] = {}
        self._points: list[tuple[float, float, float]] = []

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._has_root and name != _ROOT:
            raise UserError(f"{self._path}: is not a file of ASAP: it is <{name}>, not <{_ROOT}>")
        self._has_root = True
        if name == "Annotation":
            self._count += 1
            self._attributes, self._points = attributes, []
        elif name == "Coordinate":
            self._add_point(attributes)

    def end(self, name: str) -> None:
        if name != "Annotation":
            return
        kind = self._attributes.get("Type", "").casefold()
        if kind not in ("polygon", "spline", "rectangle"):
            self.left_out += 1
            return
        group = self._attributes.get("PartOfGroup", "")
        shapes = self.tumour if is_tumour(group, self._where()) else self.excluded
        # Order is the number of a point, which need not be its place in the file.
        points = [point for _, *point in sorted(self._points, key=lambda each: each[0])]
        if kind == "rectangle" and len(points) == 2:  # opposite corners
            (left, top), (right, bottom) = points
            points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        shapes.append(make_shape([points], self._where()))

    def refuse_doctype(self, *_: object) -> None:
        # It could define entities that grow without end, or that are other files.
        raise UserError(f"{self._path}: has a DOCTYPE, which ASAP's files do not have; remove it")

    def _add_point(self, attributes: dict[str, str]) -> None:
        try:
            x, y = float(attributes["X"]), float(attributes["Y"])
            self._points.append((float(attributes.get("Order", len(self._points))), x, y))
        except (ValueError, KeyError) as error:
            raise UserError(f"{self._where()} has a point that is not two numbers") from error

    def _where(self) -> str:
        name = self._attributes.get("Name")
        return f"{self._path}: annotation {self._count}" + (f" ({name})" if name else "")
