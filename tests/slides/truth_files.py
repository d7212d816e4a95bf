"""Writes annotations, and the results of --mode=predict, as small files."""

import csv
import json
from pathlib import Path

import numpy as np
import tifffile

CORNERS = ((10.0, 20.0), (110.0, 20.0), (110.0, 90.0), (60.0, 130.0), (10.0, 90.0))
SQUARE = np.array([(0, 0), (1600, 0), (1600, 1600), (0, 1600)], float)  # 389 um: no ITC
DOT = SQUARE / 16  # 24 um, with the margin 99 um: an ITC
REFERENCE = "a,Tumor,IDC,Macro\nb,Tumor,IDC,Macro\nc,Normal,None,None\nd,Normal,None,None\n"


def write_asap(file: Path, shapes, kind: str = "Polygon") -> Path:
    """Writes an ASAP file; `shapes` are pairs of a group and its points."""
    annotations = "".join(
        f'<Annotation Name="A{number}" Type="{kind}" PartOfGroup="{group}" Color="#F4FA58">'
        "<Coordinates>"
        + "".join(
            f'<Coordinate Order="{order}" X="{float(x)!r}" Y="{float(y)!r}" />'
            for order, (x, y) in enumerate(points)
        )
        + "</Coordinates></Annotation>"
        for number, (group, points) in enumerate(shapes)
    )
    groups = "".join(
        f'<Group Name="{group}" PartOfGroup="None" Color="#00ff00"><Attributes /></Group>'
        for group in {group for group, _ in shapes}
    )
    file.write_text(
        f'<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>{annotations}</Annotations>'
        f"<AnnotationGroups>{groups}</AnnotationGroups></ASAP_Annotations>"
    )
    return file


def feature(rings, name: str | None = None, kind: str = "Polygon") -> dict:
    """Returns a feature as QuPath writes it; `rings` are the coordinates of its geometry."""
    properties = {"objectType": "annotation"}
    if name is not None:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    geometry = {"type": kind, "coordinates": rings}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def closed(points) -> list[list[float]]:
    """Returns a ring of GeoJSON, whose last point is the first."""
    return [list(map(float, point)) for point in (*points, points[0])]


def write_geojson(file: Path, features) -> Path:
    """Writes a FeatureCollection."""
    file.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return file


def write_mask(file: Path, mask: np.ndarray, value: int = 255, **options) -> Path:
    """Writes a mask of 0 and `value`."""
    tifffile.imwrite(file, mask.astype(np.uint8) * value, **options)
    return file


def write_run(workdir: Path, slides: dict[str, dict], table: bool = True) -> Path:
    """Writes what --mode=predict leaves of slides.

    Args:
        slides: by name; each has `detections` ([x, y, probability] rows) and changes to slide.json.
            One with `error` has failed.
    """
    rows = []
    for name, changes in slides.items():
        record = {
            "name": name, "file": f"{name}.tif", "reader": "tifffile", "classes": ["0", "1"],
            "threshold": 0.5, "width": 6400, "height": 4800, "mpp": 0.243, "level": 0,
            "windows": 40, "failed": 0, "positives": 3, "score": 0.5, "lesion_class": "none",
            "largest_lesion_um": 0.0, "tissue_share": 0.5,
        } | changes  # fmt: skip
        detections = record.pop("detections", [])
        rows.append([name, record["file"], "failed" if "error" in record else "done"])
        if "error" in record:
            continue
        folder = workdir / "slides" / name
        folder.mkdir(parents=True)
        (folder / "slide.json").write_text(json.dumps(record))
        with open(folder / "detections.csv", "w", newline="") as stream:
            csv.writer(stream).writerows([["x", "y", "probability"], *detections])
    if table:
        with open(workdir / "slides.csv", "w", newline="") as stream:
            csv.writer(stream).writerows([["name", "file", "status"], *rows])
    return workdir


def hand_made(tmp_path, reference=None):
    """Four slides: two lesions and an ITC; one lesion; none; none.

    a: lesion 1 is found at 0.9 and 0.6, lesion 2 never; the ITC has 0.95; outside there is 0.8
    b: its lesion is found at 0.5
    c: outside 0.7, 0.4, 0.4
    d: outside 0.3

    The four slides have three lesions that are no ITC. From the highest threshold down:

        threshold  false positives per slide  lesions found
        0.9        0                          1/3
        0.8        1/4                        1/3
        0.7        2/4                        1/3
        0.5        2/4                        2/3
        0.4        4/4                        2/3
        0.3        5/4                        2/3

    So sensitivity is 1/3 at 1/4, 2/3 at 1/2, and 2/3 at 1, 2, 4 and 8. The score is their mean,
    (1/3 + 5 * 2/3) / 6 = 11/18. (0.6 is the second best in its lesion and is no threshold.)
    """
    truth = tmp_path / "truth"
    truth.mkdir()
    near, far, dot = SQUARE + 320, SQUARE + (3200, 320), DOT + (640, 3840)
    write_asap(truth / "a.xml", [("Tumor", near), ("Tumor", far), ("Tumor", dot)])
    write_asap(truth / "b.xml", [("_0", near)])
    if reference:
        (truth / "reference.csv").write_text(reference)
    inside, outside = (1000.5, 1000.5), (6000.0, 4000.0)
    slides = {
        "a": {"score": 0.9, "lesion_class": "macro",
              "detections": [(*inside, 0.6), (1500, 900, 0.9), (690, 3890, 0.95), (*outside, 0.8)]},
        "b": {"score": 0.6, "lesion_class": "micro", "detections": [(*inside, 0.5)]},
        "c": {"score": 0.6, "detections": [(*outside, 0.7), (*inside, 0.4), (*outside, 0.4)]},
        "d": {"score": 0.3, "lesion_class": "ITC", "detections": [(*outside, 0.3)]},
    }  # fmt: skip
    return write_run(tmp_path / "run", slides), truth
