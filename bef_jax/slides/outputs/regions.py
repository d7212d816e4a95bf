"""regions.geojson.gz: outlines of what a network calls positive, which QuPath opens."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from bef_jax.errors import printable
from bef_jax.runtime import files
from bef_jax.scoring.heatmap import class_colours
from bef_jax.slides.annotations import LESION_CLASSES
from bef_jax.slides.outputs.outlines import Outlines, trace
from bef_jax.slides.outputs.window_map import WindowMap

# Smallest longest diameters of metastases in micrometres, as the TNM classification has them.
_MICRO, _MACRO = 200, 2000
_FEW = 32  # corners of a ring of which all pairs are compared
_BAND = 64  # rows of windows
# With more regions than this, each has less text: 24 MB for 100,000 regions of one window, not 37.
_MANY = 25_000
_BATCH = 1 << 13  # regions whose text is made at a time
_LEVEL = 6  # of gzip


@dataclass(frozen=True)
class Regions:
    """Windows of the same class that are joined over their sides, sorted by class.

    Attributes:
        classes: int [M], number of the class.
        greatest: float64 [M], the greatest probability of its windows.
        mean: float64 [M], the mean of them.
        areas: float64 [M], in square micrometres.
        diameters: float64 [M], the longest distance of two corners, in micrometres.
        outlines: rings of regions 1 to M.
        borders: x and y of the borders between cells, in pixels of level 0.
    """

    classes: np.ndarray
    greatest: np.ndarray
    mean: np.ndarray
    areas: np.ndarray
    diameters: np.ndarray
    outlines: Outlines
    borders: tuple[np.ndarray, np.ndarray]


def find_regions(found: WindowMap) -> Regions:
    """Returns the regions of all classes but class 0, in the order of their first windows."""
    labels, classes = _labels(found.called)
    outlines, borders = trace(labels), found.borders()
    greatest, sums, cells, areas = np.zeros((4, len(classes)))
    widths, heights = map(np.diff, borders)
    # Row by row in bands, because arrays of all windows' numbers would take much memory.
    for top in range(0, len(labels), _BAND):
        rows, columns = np.nonzero(labels[top : top + _BAND])
        rows += top
        numbers, values = labels[rows, columns] - 1, found.probability[rows, columns]
        np.maximum.at(greatest, numbers, values)
        np.add.at(sums, numbers, values)
        np.add.at(cells, numbers, 1)
        np.add.at(areas, numbers, widths[columns] * heights[rows])
    diameters = _diameters(outlines, borders) * found.mpp
    areas *= found.mpp**2
    return Regions(classes, greatest, sums / cells, areas, diameters, outlines, borders)


def _labels(called: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the number of each window's region, from 1 on, and the class of each region."""
    labels, classes = np.zeros(called.shape, np.int32), []
    for number in np.unique(called[called > 0]).tolist():
        area = called == number
        of_class, count = ndimage.label(area)
        labels[area] = of_class[area] + len(classes)
        classes += [number] * count
    return labels, np.array(classes, int)


def _diameters(outlines: Outlines, borders: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Returns the longest distance of two corners of each region, in pixels of level 0."""
    _, outer = np.unique(outlines.regions, return_index=True)
    starts = outlines.starts[outer]
    counts = outlines.starts[outer + 1] - starts
    diameters = np.zeros(len(outer))

    def corners(places: np.ndarray) -> np.ndarray:
        return np.stack([borders[0][outlines.columns[places]], borders[1][outlines.rows[places]]])

    # Most regions are small. Take those with equal numbers of corners together.
    for count in np.unique(counts[counts <= _FEW]):
        chosen = np.flatnonzero(counts == count)
        points = corners(starts[chosen] + np.arange(count)[:, None])
        for one, other in itertools.combinations(range(count), 2):
            apart = np.hypot(*(points[:, one] - points[:, other]))
            diameters[chosen] = np.maximum(diameters[chosen], apart)
    for number in np.flatnonzero(counts > _FEW):
        points = corners(starts[number] + np.arange(counts[number])).T
        diameters[number] = pdist(points[ConvexHull(points).vertices]).max()
    return diameters


def lesion_class(diameter: float) -> str:
    """Returns the class of a lesion by its longest diameter, in micrometres; 0 is no lesion.

    Metastases are micro from 0.2 mm and macro above 2 mm; smaller ones are isolated tumour cells.
    """
    number = (diameter > 0) + (diameter >= _MICRO) + (diameter > _MACRO)
    return LESION_CLASSES[number]


def write_regions(file: Path, regions: Regions, classes: Sequence[str]) -> None:
    """Writes regions as GeoJSON with coordinates in pixels of level 0.

    Rings are closed. Outer ones are counter-clockwise and holes clockwise, as RFC 7946 asks, in its
    own axes, where y points up. So in the picture, where y points down, outer ones are clockwise.
    With more than 25,000 regions, classes, colours and mean probabilities are left out.
    """
    with files.replacing_gzip(file, _LEVEL) as out:
        for text in geojson(regions, classes):
            out.write(text.encode())


def geojson(regions: Regions, classes: Sequence[str]) -> Iterator[str]:
    """Yields the text of a GeoJSON file in parts."""
    yield '{"type":"FeatureCollection","features":['
    for first in range(0, len(regions.classes), _BATCH):
        features = _features(regions, first, first + _BATCH, classes)
        yield ("," if first else "") + "\n" + ",\n".join(features)
    yield "\n]}\n"


def _features(regions: Regions, first: int, stop: int, classes: Sequence[str]) -> Iterator[str]:
    """Yields the features of the regions first .. stop - 1, counted from 0.

    QuPath takes a feature that does not say what it is as an annotation.
    """
    is_short = len(regions.classes) > _MANY
    starts = (_short_starts if is_short else _starts)(classes)
    facts = (
        values[first:stop].tolist()
        for values in (
            regions.classes,
            regions.greatest,
            regions.mean,
            regions.areas,
            regions.diameters,
        )
    )
    polygons = _polygons(regions, first, stop)
    rows = zip(itertools.count(first + 1), polygons, *facts, strict=False)
    for number, polygon, kind, greatest, mean, area, diameter in rows:
        before, after = starts[kind]
        more = "" if is_short else f'"mean probability":{mean:.4g},'
        yield (
            '{"type":"Feature","geometry":{"type":"Polygon","coordinates":['
            f'{polygon}]}},"properties":{{{before}{number}{after},"measurements":{{"probability":'
            f'{greatest:.4g},{more}"area um^2":{area:.1f},"diameter um":{diameter:.1f}}}}}}}'
        )


def _starts(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns, for each class, what stands before and after a region's number in its properties."""
    return [
        (
            f'"objectType":"annotation","name":"{name} ',
            f'","classification":{{"name":"{name}","color":[{red},{green},{blue}]}}',
        )
        for name, (red, green, blue) in zip(_escaped(classes), class_colours(classes), strict=True)
    ]


def _short_starts(classes: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the same for a file of many regions; of two classes, all regions are of one."""
    if len(classes) == 2:
        return [('"name":"', '"')] * 2
    return [(f'"name":"{name} ', '"') for name in _escaped(classes)]


def _escaped(classes: Sequence[str]) -> list[str]:
    return [json.dumps(printable(name))[1:-1] for name in classes]


def _polygons(regions: Regions, first: int, stop: int) -> Iterator[str]:
    """Yields the rings of each region as text, with commas between them."""
    outlines = regions.outlines
    low, high = np.searchsorted(outlines.regions, (first + 1, stop + 1))
    starts = outlines.starts[low : high + 1]
    x, y = _texts(regions.borders)
    part = slice(starts[0], starts[-1])
    corners = zip(outlines.columns[part].tolist(), outlines.rows[part].tolist(), strict=True)
    points = [f"[{x[column]},{y[row]}]" for column, row in corners]
    bounds = itertools.pairwise((starts - starts[0]).tolist())
    rings = (f"[{','.join(points[a:b])},{points[a]}]" for a, b in bounds)
    for _, of_region in itertools.groupby(
        zip(outlines.regions[low:high].tolist(), rings, strict=True), key=lambda each: each[0]
    ):
        yield ",".join(ring for _, ring in of_region)


def _texts(borders: tuple[np.ndarray, np.ndarray]) -> Iterator[list[str]]:
    """Yields the texts of x and of y, which are without decimals where the numbers are whole."""
    return ([f"{value:.2f}".rstrip("0").rstrip(".") for value in values] for values in borders)
