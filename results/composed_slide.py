"""Composes slides of labelled patches, and checks what is predicted on them and drawn from them.

    python results/composed_slide.py compose OUT --patches=DIR/valid.npz
    python results/composed_slide.py compare OUT --slides=WORKDIR --scores=RUN/scores_valid.csv
    python results/composed_slide.py labels OUT --store=OUT/slides/store_slides

Whole slides with a known truth are too large to keep. Composed ones are small, and each patch in
them has a known label and a known score. composed_slide.sh here runs all that it takes.

`compose` lays patches of 96 px out on a grid at 0.972 um/px, in tissue with lesions and glass
around it. The slides are pyramids of 0.243 um/px, whose level 2 has exactly the patches. Patches
begin at 64 px, because the tile of the window at 96 begins 32 px before it: at a stride of 96, each
tile is one patch. OUT gets slides/, the truth in three forms (truth_mask/, truth_xml/,
truth_geojson/), and cells.csv with the place of each patch.
"""

import argparse
import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
import tifffile
from sklearn.metrics import roc_auc_score

SIDE, STRIDE, CENTER = 96, 96, 32  # pixels: a patch, a step of the grid, the deciding square
MARGIN = (SIDE - CENTER) // 2
FIRST = STRIDE - MARGIN  # where the first patch begins in x and y
MPP, FINER = 0.972, 4  # um/px of the patches; pixels of level 0 for each of theirs
GLASS = (243, 242, 244)
TILE = 256
# The rows and columns of each slide, and the ellipses of its tissue and of its lesions: the row and
# column of the middle, and two radii.
PLANS = {
    "tumor_1": ((38, 40), [(18, 17, 17, 16), (27, 37, 5, 2)], [(17, 16, 13, 12), (27, 37, 2, 1)]),
    "tumor_2": ((30, 32), [(14, 15, 13, 14)], [(10, 9, 3, 3), (20, 20, 1, 2), (8, 22, 0, 0)]),
    "normal_1": ((22, 28), [(10, 9, 9, 8), (11, 23, 7, 3)], []),
    "normal_2": ((14, 16), [(6, 7, 5, 6)], []),
}
CLASSES = {"tumor_1": "macro", "tumor_2": "micro"}  # of the largest lesion


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    composing = commands.add_parser("compose", help="writes slides and their truth")
    composing.add_argument("--patches", type=Path, required=True, help="images, labels and ids")
    comparing = commands.add_parser("compare", help="compares windows with patches")
    comparing.add_argument("--slides", type=Path, required=True, help="workdir of predict")
    comparing.add_argument("--scores", type=Path, required=True, help="of the patches")
    labelling = commands.add_parser("labels", help="checks patches that were drawn from slides")
    labelling.add_argument("--store", type=Path, required=True, help="of the source slides")
    for each in (composing, comparing, labelling):
        each.add_argument("out", type=Path, help="folder of the slides")
    return parser.parse_args(argv)


# ---- composing ----------------------------------------------------------------------------------


def compose(out: Path, patches: Path) -> None:
    """Writes slides of the patches of a npz, and their truth."""
    with np.load(patches) as found:
        images, labels, ids = found["images"], found["labels"], found["ids"]
    unused = {label: iter(np.flatnonzero(labels == label)) for label in (0, 1)}
    for name in ("slides", "truth_mask", "truth_xml", "truth_geojson"):
        (out / name).mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (shape, tissue, lesions) in PLANS.items():
        areas = [ellipse(shape, each) for each in lesions]
        cells = lay_out(shape, [ellipse(shape, each) for each in tissue], areas, unused)
        write_slide(out / "slides" / f"{name}.tif", picture_of(cells, images))
        write_truth(out, name, areas)
        for row, column in np.argwhere(cells >= 0):
            index = cells[row, column]
            rows.append([name, row, column, ids[index], int(labels[index])])
    write_reference(out)
    with open(out / "cells.csv", "w", newline="") as file:
        csv.writer(file).writerows([["slide", "row", "column", "id", "label"], *rows])
    print_line(slides=len(PLANS), patches=len(rows), tumour=sum(row[-1] for row in rows))


def ellipse(shape: tuple[int, int], place: tuple[int, int, int, int]) -> np.ndarray:
    """Returns an ellipse of cells, bool; its rows have no gaps."""
    row, column, high, wide = place
    y, x = np.ogrid[: shape[0], : shape[1]]
    return ((y - row) / (high + 0.5)) ** 2 + ((x - column) / (wide + 0.5)) ** 2 <= 1


def lay_out(
    shape: tuple[int, int],
    tissue: list[np.ndarray],
    lesions: list[np.ndarray],
    unused: dict[int, Iterator[int]],
) -> np.ndarray:
    """Returns the index of a patch for each cell, int; -1 is glass."""
    label = np.where(np.any(tissue, axis=0), 0, -1)
    for area in lesions:
        label[area] = 1
    cells = np.full(shape, -1)
    for row, column in np.argwhere(label >= 0):
        cells[row, column] = next(unused[label[row, column]])
    return cells


def picture_of(cells: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Returns the slide at the scale of the patches, uint8 [H, W, 3]."""
    height, width = (FIRST + SIDE * count + SIDE for count in cells.shape)
    pixels = np.full((height, width, 3), GLASS, np.uint8)
    for row, column in np.argwhere(cells >= 0):
        y, x = FIRST + SIDE * row, FIRST + SIDE * column
        pixels[y : y + SIDE, x : x + SIDE] = images[cells[row, column]]
    return pixels


def write_slide(file: Path, pixels: np.ndarray) -> None:
    """Writes a pyramid: two finer levels that repeat the pixels, the pixels, and two coarser."""
    with tifffile.TiffWriter(file) as tif:
        for number, factor in enumerate((4, 2, 1)):
            write_level(tif, pixels, factor, number)
        for number, step in ((3, 2), (4, 4)):
            write_level(tif, np.ascontiguousarray(pixels[::step, ::step]), 1, number)


def write_level(tif: tifffile.TiffWriter, pixels: np.ndarray, factor: int, number: int) -> None:
    """Writes a level whose pixels are repeated, without a copy of all of it in memory."""
    height, width = pixels.shape[:2]
    per_cm = 10_000 / (MPP / FINER * 2**number)
    tif.write(
        tiles(pixels, factor),
        shape=(height * factor, width * factor, *pixels.shape[2:]),
        dtype=np.uint8,
        tile=(TILE, TILE),
        photometric="rgb" if pixels.ndim == 3 else "minisblack",
        compression="deflate",
        subfiletype=1 if number else 0,
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        metadata=None,
    )


def tiles(pixels: np.ndarray, factor: int) -> Iterator[np.ndarray]:
    """Yields the tiles of a level; those at the edges are filled up with zeros."""
    side = TILE // factor
    for y in range(0, pixels.shape[0], side):
        for x in range(0, pixels.shape[1], side):
            part = pixels[y : y + side, x : x + side]
            rest = [(0, side - length) for length in part.shape[:2]] + [(0, 0)] * (part.ndim - 2)
            yield np.pad(part, rest).repeat(factor, 0).repeat(factor, 1)


# ---- the truth ----------------------------------------------------------------------------------


def write_truth(out: Path, name: str, areas: list[np.ndarray]) -> None:
    """Writes the lesions of a slide as mask, as ASAP writes them, and as QuPath does."""
    if not areas:
        return
    mask = np.where(np.any(areas, axis=0), 255, 0).astype(np.uint8).repeat(SIDE, 0).repeat(SIDE, 1)
    mask = np.pad(mask, (FIRST, SIDE))
    with tifffile.TiffWriter(out / f"truth_mask/{name}_mask.tif") as tif:
        for number in (2, 3, 4, 5):
            step = 2 ** (number - 2)
            write_level(tif, np.ascontiguousarray(mask[::step, ::step]), 1, number)
    outlines = list(map(outline, areas))
    (out / f"truth_xml/{name}.xml").write_text(asap(outlines))
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*points, points[0]]]},
            "properties": {"objectType": "annotation", "classification": {"name": "Tumor"}},
        }
        for points in outlines
    ]
    collection = {"type": "FeatureCollection", "features": features}
    (out / f"truth_geojson/{name}.geojson").write_text(json.dumps(collection))


def outline(area: np.ndarray) -> list[tuple[int, int]]:
    """Returns the corners of an area whose rows have no gaps, x and y in pixels of level 0."""
    left, right = [], []
    for row in np.flatnonzero(area.any(axis=1)):
        columns = np.flatnonzero(area[row])
        for y in (row, row + 1):
            left.append((columns[0], y))
            right.append((columns[-1] + 1, y))
    return [tuple(int(FIRST + SIDE * c) * FINER for c in point) for point in left + right[::-1]]


def asap(outlines: list[list[tuple[int, int]]]) -> str:
    """Returns a file of ASAP, with a polygon for each outline."""
    annotations = []
    for number, points in enumerate(outlines):
        coordinates = "".join(
            f'<Coordinate Order="{order}" X="{x}" Y="{y}" />' for order, (x, y) in enumerate(points)
        )
        name = quoteattr(f"Annotation {number}")
        annotations.append(
            f'<Annotation Name={name} Type="Polygon" PartOfGroup="Tumor" Color="#F4FA58">'
            f"<Coordinates>{coordinates}</Coordinates></Annotation>"
        )
    return (
        f'<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>{"".join(annotations)}'
        "</Annotations></ASAP_Annotations>\n"
    )


def write_reference(out: Path) -> None:
    """Writes which slides have tumour, beside each form of the truth."""
    lines = [
        f"{name},{'Tumor' if plan[2] else 'Normal'},{CLASSES.get(name, 'none')}\n"
        for name, plan in PLANS.items()
    ]
    for form in ("mask", "xml", "geojson"):
        (out / f"truth_{form}/reference.csv").write_text("image,type,class\n" + "".join(lines))


# ---- checking -----------------------------------------------------------------------------------


def compare(out: Path, slides: Path, scores: Path) -> None:
    """Compares the probabilities of windows, at a stride of 96, with those of the same patches."""
    alone = {row["id"]: float(row["probability"]) for row in read(scores)}
    cells = {
        (row["slide"], int(row["row"]), int(row["column"])): row for row in read(out / "cells.csv")
    }
    found = [
        (cells.get((name, *cell_of(window))), window["probability"])
        for name in PLANS
        for window in read(slides / "slides" / name / "tiles.csv.gz")
    ]
    pairs = [(int(cell["label"]), float(p), alone[cell["id"]]) for cell, p in found if cell]
    labels, windows, patches = np.array(pairs).T
    print_line(
        patches=len(cells),
        windows=len(pairs),
        # A patch whose middle has no colour is glass to predict.
        patches_left_out=len(cells) - len(pairs),
        windows_without_patch=len(found) - len(pairs),
        largest_difference=float(np.abs(windows - patches).max()),
        auc_of_windows=float(roc_auc_score(labels, windows)),
        auc_of_these_patches=float(roc_auc_score(labels, patches)),
    )


def cell_of(window: dict[str, str]) -> tuple[int, int]:
    """Returns the row and column of the cell in whose middle a window lies."""
    return tuple((int(window[axis]) // FINER - STRIDE) // SIDE for axis in "yx")


def print_line(**facts: float) -> None:
    """Prints a line of JSON."""
    print(json.dumps(facts))


def labels(out: Path, store: Path) -> None:
    """Checks the pixels and labels of patches that the source slides drew."""
    from bef_jax.data.store import open_split

    known = {name: read_slide(out, name) for name in PLANS}
    found = [open_split(store, folder.name) for folder in store.iterdir() if folder.is_dir()]
    wrong_pixels = wrong_labels = 0
    for split in found:
        for image, label, name in zip(split.images, split.labels, split.ids, strict=True):
            slide, x, y = name.split(":")
            pixels, is_tumour = expected(
                *known[slide], *(int(each[2:]) // FINER for each in (x, y))
            )
            wrong_pixels += int(not np.array_equal(image, pixels))
            wrong_labels += int(label != is_tumour)
    print_line(
        patches=sum(map(len, found)),
        tumour=sum(int(split.labels.sum()) for split in found),
        wrong_pixels=wrong_pixels,
        wrong_labels=wrong_labels,
    )


def expected(pixels: np.ndarray, tumour: np.ndarray, x: int, y: int) -> tuple[np.ndarray, bool]:
    """Returns the patch whose middle square begins at (x, y), and whether this has tumour."""
    place = slice(y, y + SIDE), slice(x, x + SIDE)  # of the padded slide
    middle = slice(MARGIN, SIDE - MARGIN)
    return pixels[place], bool(tumour[place][middle, middle].any())


def read_slide(out: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels and tumour at the scale of the patches, with a mirrored margin."""
    with tifffile.TiffFile(out / f"slides/{name}.tif") as tif:
        pixels = tif.pages[FINER // 2].asarray()
    tumour = np.zeros(pixels.shape[:2], bool)
    for row in read(out / "cells.csv"):
        if row["slide"] == name and row["label"] == "1":
            y, x = (FIRST + SIDE * int(row[axis]) for axis in ("row", "column"))
            tumour[y : y + SIDE, x : x + SIDE] = True
    around = [(MARGIN, SIDE)] * 2
    return np.pad(pixels, [*around, (0, 0)], "reflect"), np.pad(tumour, around)


def read(file: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of a table, which may be packed."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt") as stream:
        yield from csv.DictReader(stream)


def main() -> None:
    """Runs one command."""
    arguments = vars(parse_arguments())
    COMMANDS[arguments.pop("command")](**arguments)


COMMANDS = {"compose": compose, "compare": compare, "labels": labels}

if __name__ == "__main__":
    main()
