"""Reads polygons from GeoJSON, as QuPath writes it; its coordinates are pixels of level 0."""

import gzip
import json
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bef_jax.errors import UserError, reason_of
from bef_jax.runtime.files import open_user_file
from bef_jax.slides.annotations.polygons import Polygons, Shape, is_tumour, make_shape

LOG = logging.getLogger(__name__)
_LONGEST_MIB = 96  # some 4 million points; Python's objects can take twenty times as much memory


def read_geojson(path: Path) -> Polygons:
    """Reads the polygons of a FeatureCollection, a list of features, or one feature or geometry.

    A feature's class is that of QuPath (`properties.classification`), or else its name. Points and
    lines are left out, with a warning that says how many they are.

    Raises:
        UserError: it is not such a file, or a class or a number in it is wrong.
    """
    shapes: dict[bool, list[Shape]] = {True: [], False: []}
    left_out = 0
    for number, feature in enumerate(_features(_content(path), path), 1):
        where = f"{path}: feature {number}"
        polygons = list(_polygons(feature, where))
        left_out += polygons.count(None)
        for rings in filter(None, polygons):
            shapes[is_tumour(_class_of(feature, where), where)].append(make_shape(rings, where))
    if left_out:
        LOG.warning("%s: %d features have no area and are left out", path, left_out)
    return Polygons(path, shapes[True], shapes[False])


def _content(path: Path) -> Any:
    try:
        with open_user_file(path) as stream:
            is_packed = path.suffix.lower() == ".gz"
            source = gzip.GzipFile(fileobj=stream) if is_packed else stream
            text = source.read((_LONGEST_MIB << 20) + 1)
        if len(text) > _LONGEST_MIB << 20:
            raise UserError(f"{path}: is longer than {_LONGEST_MIB} MiB; simplify its outlines")
        return json.loads(text)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, RecursionError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as GeoJSON ({reason_of(error)})") from error


def _features(content: Any, path: Path) -> list[dict]:
    found = content
    if isinstance(content, dict):
        is_collection = content.get("type") == "FeatureCollection"
        found = content.get("features") if is_collection else [content]
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise UserError(f"{path}: is not GeoJSON: it has no list of features")
    return found


def _polygons(feature: dict, where: str) -> Iterator[list | None]:
    """Yields the rings of each polygon of a feature, and None for a geometry without area."""
    geometry = feature.get("geometry") if feature.get("type") == "Feature" else feature
    if geometry is None:  # GeoJSON allows it: a feature without a place
        return
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        yield None
        return
    if kind not in ("Polygon", "MultiPolygon"):
        raise UserError(f"{where} is neither a Polygon nor a MultiPolygon, but {kind!r}")
    polygons = geometry.get("coordinates")
    polygons = [polygons] if kind == "Polygon" else polygons
    if not _is_list_of_lists(polygons) or not all(map(_is_list_of_lists, polygons)):
        raise UserError(f"{where} has no lists of points as its coordinates")
    yield from polygons


def _is_list_of_lists(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, list) for each in value)


def _class_of(feature: dict, where: str) -> str:
    """Returns the name of a feature's class; "" if it has none."""
    properties = feature.get("properties") or {}
    if not isinstance(properties, dict):
        raise UserError(f"{where} has properties that are not an object")
    found = properties.get("classification") or properties.get("name") or ""
    if isinstance(found, dict):
        # Newer versions of QuPath write the parts of a derived class, such as Tumor: Positive.
        found = found.get("name") or ": ".join(map(str, found.get("names") or []))
    return str(found)
