"""Writes the page of all slides of a run: a card each, with heat map, score and files.

The page contains its pictures, works offline and runs no script, so that one file can be mailed.
"""

import functools
import io
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

from PIL import Image

from bef_jax.errors import printable
from bef_jax.report.html import data_uri, table
from bef_jax.runtime.devices import cores
from bef_jax.runtime.files import open_user_file, replacing
from bef_jax.scoring.class_names import positive_name

# The files of a slide that a card links to, with their names on the page.
_FILES = {
    "heatmap.png": "heat map",
    "mask.png": "tissue",
    "regions.geojson.gz": "regions",
    "detections.csv": "detections",
    "tiles.csv.gz": "windows",
    "probability.tif": "map",
    "slide.json": "facts",
}
_ALL_PICTURES = 5_000_000  # bytes as JPEG; base64 makes them a third larger
_ONE_PICTURE = 120_000  # bytes at most
_SIDES = (1200, 900, 675, 500, 375, 280, 210, 160, 120)  # pixels of a picture's longer side
_QUALITY = 80  # of JPEG
_SHARES = 5  # classes on a card; the others are summed up
_CLASSES = {
    "none": "no positive region",
    "ITC": "ITC",
    "micro": "micrometastasis",
    "macro": "macrometastasis",
}
_SOURCE = 'All figures are also in <a href="slides.csv">slides.csv</a>.'
_SOURCE_OF_SHARES = (
    'Sizes are also in <a href="slides.csv">slides.csv</a>, and the windows of each class in the '
    "facts of each slide."
)


def write_slides_page(workdir: Path, slides: list[dict]) -> Path:
    """Writes WORKDIR/slides.html, and returns its path.

    Slides with the greatest score come first. Those that failed are listed at the end. The page
    stays below about 8 MB up to some 1,000 slides, because its pictures get smaller.

    Args:
        slides: the content of each slide.json; a failed slide has `name`, `file` and `error`.
    """
    done = sorted((each for each in slides if "error" not in each), key=_place)
    failed = sorted((each for each in slides if "error" in each), key=lambda each: each["name"])
    page = workdir / "slides.html"
    limit = min(_ONE_PICTURE, _ALL_PICTURES // max(1, len(done)))
    card = functools.partial(_card, workdir, limit)
    with (
        ThreadPoolExecutor(cores()) as pool,
        replacing(page, "w", encoding="utf-8", errors="backslashreplace") as stream,
    ):
        stream.write(_head(workdir.resolve().name, done, failed))
        stream.write('<div class="slides">\n')
        # Threads help, because Pillow takes a fraction of a second for a large heat map. Cards that
        # wait in memory are as small as the page.
        stream.writelines(pool.map(card, done))
        stream.write(f"</div>\n{_failures(failed)}</html>\n")
    return page


def _place(slide: Mapping[str, Any]) -> tuple[float, str]:
    """Returns what slides are sorted by: the greatest score first, then by name."""
    return -_score(slide), slide["name"]


def _score(slide: Mapping[str, Any]) -> float:
    """Returns a slide's score; -1 if it has none: without tissue, or with more than two classes."""
    score = slide.get("score")
    return -1.0 if score is None or math.isnan(score) else score


def _text(value: object) -> str:
    """Returns a value as text of the page."""
    return escape(printable(str(value)), quote=True)


# ---- the head and the end of the page -----------------------------------------------------------


def _head(title: str, done: list[dict], failed: list[dict]) -> str:
    files = resources.files("bef_jax.report")
    read = {name: files.joinpath(name).read_text(encoding="utf-8") for name in
            ("slides.html", "page.css", "slides.css")}  # fmt: skip
    # All slides of a run have the same network and settings.
    one = done[0] if done else {}
    keys = ("checkpoint", "threshold", "tta") if _is_binary(one) else ("checkpoint", "tta")
    rows = [[key, printable(str(one[key]))] for key in keys if one.get(key) is not None]
    return Template(read["slides.html"]).substitute(
        title=_text(title),
        style=read["page.css"] + read["slides.css"],
        headline=_headline(done, failed),
        note=_note(one),
        source=_SOURCE if _is_binary(one) else _SOURCE_OF_SHARES,
        facts=table([["", ""], *rows]) if rows else "",
    )


def _headline(done: list[dict], failed: list[dict]) -> str:
    count = len(done) + len(failed)
    parts = [f"{count:,} slide{'s' if count != 1 else ''}"]
    if any(_is_binary(each) for each in done):
        positive = sum(bool(each.get("positives")) for each in done)
        parts.append(f"{positive:,} with a positive window")
    if failed:
        parts.append(f'<a href="#failed">{len(failed):,} failed</a>')
    return ", ".join(parts)


def _note(slide: Mapping[str, Any]) -> str:
    """Returns what the figures of the cards mean."""
    if not slide:
        return ""
    if not _is_binary(slide):
        return "<p>The shares are those of the windows that are called each class.</p>\n"
    name = _text(positive_name(slide.get("classes") or ("0", "1")))
    return (
        f"<p>A score is the probability of {name} in the slide's most suspicious windows. The "
        "class goes by the longest diameter of the largest region: isolated tumour cells (ITC) "
        "below 0.2 mm, a micrometastasis up to 2 mm, else a macrometastasis.</p>\n"
    )


def _failures(failed: list[dict]) -> str:
    if not failed:
        return ""
    rows = [[printable(str(each[key])) for key in ("name", "error")] for each in failed]
    return f"<section id=failed><h2>Failed</h2>{table([['slide', 'reason'], *rows])}</section>\n"


# ---- the cards ----------------------------------------------------------------------------------


def _card(workdir: Path, limit: int, slide: Mapping[str, Any]) -> str:
    folder = workdir / "slides" / slide["name"]
    # A name may hold bytes that are not text, which Python keeps as surrogates.
    address = "slides/" + quote(slide["name"], errors="surrogateescape")
    verdict = _verdict(slide) if _is_binary(slide) else _shares(slide)
    return (
        f"<article>{_picture(folder, address, slide['name'], limit)}"
        f"<div><h3>{_text(slide['name'])}</h3>{verdict}"
        f"<p>{'<br>'.join(_facts(slide))}</p>{_failed_windows(slide)}{_links(folder, address)}"
        "</div></article>\n"
    )


def _is_binary(slide: Mapping[str, Any]) -> bool:
    return len(slide.get("classes") or (0, 1)) == 2


def _verdict(slide: Mapping[str, Any]) -> str:
    """Returns the score, the class of the largest lesion, and a bar as long as the score."""
    score = _score(slide)
    if score < 0:
        return '<p class="score"><b>-</b> no window was scored</p>'
    lesion = str(slide.get("lesion_class") or "none")
    found = _CLASSES.get(lesion, lesion)
    if (longest := slide.get("largest_lesion_um")) and lesion != "none":
        found += f", {_length(longest)}"
    kind = "positive" if slide.get("positives") else ""
    return f'<p class="score"><b>{score:.3f}</b> <span>{_text(found)}</span></p>{_bar(score, kind)}'


def _bar(share: float, kind: str = "") -> str:
    return f'<div class="bar {kind}"><i style="width:{share:.1%}"></i></div>'


def _length(micrometres: float) -> str:
    return f"{micrometres / 1000:.3g} mm" if micrometres >= 100 else f"{micrometres:.0f} µm"


def _shares(slide: Mapping[str, Any]) -> str:
    """Returns a bar for each of the most frequent classes, as long as its share of the windows."""
    counts = slide.get("counts") or {}
    total = sum(counts.values())
    if not total:
        return '<p class="score"><b>-</b> no window was scored</p>'
    frequent = sorted(counts.items(), key=lambda each: -each[1])
    shown = [(name, count) for name, count in frequent[:_SHARES] if count]
    if rest := total - sum(count for _, count in shown):
        shown.append(("others", rest))
    return "".join(
        f'<p class="share">{_text(name)} {count / total:.1%}</p>{_bar(count / total)}'
        for name, count in shown
    )


def _facts(slide: Mapping[str, Any]) -> list[str]:
    """Returns lines about a slide; a fact that it lacks is left out."""
    lines = []
    if (windows := slide.get("windows")) is not None:
        positives = slide.get("positives")
        counted = f", {positives:,} positive" if _is_binary(slide) and positives else ""
        tissue = slide.get("tissue_share")
        share = "" if tissue is None else f"; tissue {tissue:.1%}"
        lines.append(f"{windows:,} windows{counted}{share}")
    if slide.get("width") and slide.get("mpp"):
        size = f"{slide['width']:,} &times; {slide['height']:,} px"
        lines.append(f"{size}, {slide['mpp']:.4g} µm/px")
    return lines


def _failed_windows(slide: Mapping[str, Any]) -> str:
    if not (failed := slide.get("failed")):
        return ""
    return f'<p class="bad">{failed:,} windows could not be decoded</p>'


def _links(folder: Path, address: str) -> str:
    links = [
        f'<a href="{address}/{file}">{name}</a>'
        for file, name in _FILES.items()
        if (folder / file).is_file()
    ]
    return f'<p class="files">{" ".join(links)}</p>' if links else ""


def _picture(folder: Path, address: str, name: str, limit: int) -> str:
    """Returns a link to the heat map: a small picture of it, of at most `limit` bytes."""
    try:
        with open_user_file(folder / "heatmap.png") as stream, Image.open(stream) as picture:
            small = _jpeg(picture.convert("RGB"), limit)
    except Exception:  # Pillow raises anything at all for a damaged file.
        return '<span class="none">no heat map</span>'
    alt = _text(f"heat map of {name}")
    uri = data_uri(small, "jpeg")
    return f'<a href="{address}/heatmap.png"><img alt="{alt}" src="{uri}"></a>'


def _jpeg(picture: Image.Image, limit: int) -> bytes:
    """Returns the largest of several sizes that fits into `limit` bytes, else the smallest one."""
    for small in _reduced(picture):
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
        if buffer.tell() <= limit:
            break
    return buffer.getvalue()


def _reduced(picture: Image.Image) -> Iterator[Image.Image]:
    """Yields a picture at smaller and smaller sizes."""
    for side in _SIDES:
        picture.thumbnail((side, side))  # in place, so that each size is made from the last one
        yield picture
