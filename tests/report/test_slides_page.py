"""The page of all slides, read as a browser reads it."""

import base64
import io
import math
import os
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image

from bef_jax.report.slides_page import write_slides_page
from tests import chromium

FILES = ("mask.png", "tiles.csv.gz", "regions.geojson.gz", "slide.json")
AWKWARD = "a/b#1?%20 <b>&\"' \U0001f52c"


class Page(HTMLParser):
    """What a page has: text, addresses of links and pictures, and all names of elements."""

    def __init__(self, file):
        super().__init__()
        self.texts, self.links, self.pictures, self.tags = [], [], [], set()
        head, _, rest = file.read_text(encoding="utf-8").partition("<style>")
        self.feed(head + rest.partition("</style>")[2])
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.add(tag)
        if tag == "a":
            self.links.append(found["href"])
        if tag == "img":
            data = found["src"].removeprefix("data:image/jpeg;base64,")
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))))

    def handle_data(self, data):
        self.texts.append(data)


def heat_map(file, shape=(120, 300), seed=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def make_slide(workdir, name="a", **facts):
    folder = workdir / "slides" / name
    heat_map(folder / "heatmap.png")
    for file in FILES:
        (folder / file).touch()
    return {
        "name": name, "file": f"{name}.svs", "classes": ["normal", "metastasis"],
        "threshold": 0.5, "tta": 1, "checkpoint": "runs/x/checkpoints/7", "score": 0.25,
        "lesion_class": "none", "largest_lesion_um": None, "windows": 1234, "failed": 0,
        "positives": 0, "tissue_share": 0.123, "width": 4000, "height": 3000, "mpp": 0.243,
    } | facts  # fmt: skip


def failed_slide(name, error="cannot be read"):
    return {"name": name, "file": f"{name}.svs", "error": error}


def test_cards_have_the_figures_and_lead_to_the_files(tmp_path):
    slides = [
        make_slide(tmp_path, "tame", score=0.01),
        make_slide(tmp_path, "c/high", score=0.98765, positives=12, lesion_class="macro",
                   largest_lesion_um=3214.0, failed=3),
        failed_slide("broken", "no <library> can read it"),
    ]  # fmt: skip
    file = write_slides_page(tmp_path, slides)
    page = Page(file)
    assert file == tmp_path / "slides.html"
    assert "3 slides, 1 with a positive window, 1 failed" in page.text.replace(" ,", ",")
    assert "0.988 macrometastasis, 3.21 mm" in page.text
    assert "1,234 windows, 12 positive; tissue 12.3%" in page.text
    assert "4,000 × 3,000 px, 0.243 µm/px" in page.text  # noqa: RUF001
    assert page.text.count("3 windows could not be decoded") == 1
    assert page.text.index("c/high") < page.text.index("tame") < page.text.index("broken")
    assert "broken no <library> can read it" in page.text
    assert {"slides/tame/mask.png", "slides/c/high/slide.json"} < set(page.links)
    assert "slides/tame/detections.csv" not in page.links  # it is not there


def test_links_lead_to_files_whatever_a_name_holds(tmp_path):
    names = [AWKWARD, "line\nbreak", os.fsdecode(b"bytes\xff\xfe")]
    write_slides_page(tmp_path, [make_slide(tmp_path, name) for name in names])
    page = Page(tmp_path / "slides.html")
    files = [os.fsencode(tmp_path) + b"/" + unquote_to_bytes(link) for link in page.links]
    missing = {file for file in files if not os.path.exists(file)}
    assert missing == {os.fsencode(tmp_path / "slides.csv")}  # which is not of this page
    assert sum(file.endswith(b"slide.json") for file in files) == 3


def test_everything_is_escaped(tmp_path):
    bad = "<script>alert(1)</script>\"'&"
    slides = [
        make_slide(tmp_path, AWKWARD, checkpoint=bad, lesion_class=bad, positives=1,
                   classes=["x", bad]),
        make_slide(tmp_path, "many", classes=["a", "b", bad], counts={bad: 3, "a": 1}),
        failed_slide(bad, bad),
    ]  # fmt: skip
    page = Page(write_slides_page(tmp_path, slides))
    assert "script" not in page.tags
    assert page.text.count(bad) == 6
    assert AWKWARD in page.text


def test_slides_of_many_classes_show_the_shares_of_windows(tmp_path):
    counts = {name: count for count, name in enumerate("abcdefg")} | {"other tissue": 79}
    slide = make_slide(tmp_path, classes=list(counts), counts=counts)
    slides = [slide | {"name": "z"}, slide]
    for each in slides:
        del each["score"], each["lesion_class"], each["largest_lesion_um"]
    text = Page(write_slides_page(tmp_path, slides)).text
    assert "2 slides The shares" in text
    assert "All figures" not in text  # the table has no counts
    assert "other tissue 79.0% g 6.0% f 5.0% e 4.0% d 3.0% others 3.0%" in text
    assert text.index(" a other tissue") < text.index(" z other tissue")


@pytest.mark.parametrize("score", [None, math.nan])
def test_a_slide_without_a_score_comes_last(score, tmp_path):
    slides = [make_slide(tmp_path, "a", score=score), make_slide(tmp_path, "b", score=0.0)]
    text = Page(write_slides_page(tmp_path, slides)).text
    assert text.index("b 0.000") < text.index("a - no window was scored")


def test_a_page_without_slides_is_a_page(tmp_path):
    assert "0 slides" in Page(write_slides_page(tmp_path, [])).text
    assert "1 slide, 1 failed" in Page(
        write_slides_page(tmp_path, [failed_slide("a")])
    ).text.replace(" ,", ",")


def damage(kind, file):
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:2000])
    elif kind == "FIFO":
        file.unlink()
        os.mkfifo(file)
    elif kind == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))


@pytest.mark.parametrize("kind", ["cut", "FIFO", "missing", "noise"])
def test_a_heat_map_that_cannot_be_read_is_left_out(kind, tmp_path):
    slides = [make_slide(tmp_path, "good"), make_slide(tmp_path, "bad")]
    damage(kind, tmp_path / "slides" / "bad" / "heatmap.png")
    page = Page(write_slides_page(tmp_path, slides))
    assert len(page.pictures) == 1
    assert page.text.count("no heat map") == 1


def test_pictures_are_the_heat_maps(tmp_path):
    slide = make_slide(tmp_path)
    pixels = np.zeros((400, 2000, 3), np.uint8)
    pixels[:, 1000:] = (250, 200, 20)
    Image.fromarray(pixels).save(tmp_path / "slides" / "a" / "heatmap.png")
    (picture,) = Page(write_slides_page(tmp_path, [slide])).pictures
    assert picture.size == (1200, 240)
    np.testing.assert_allclose(
        np.asarray(picture)[:, [100, 1100]].mean(0), pixels[0, [100, 1900]], atol=4
    )


def test_a_page_of_many_slides_can_be_mailed(tmp_path):
    """The heat map is noise, which JPEG can hardly compress, so it is the worst case."""
    slide = make_slide(tmp_path)
    heat_map(tmp_path / "slides" / "a" / "heatmap.png", (250, 500))
    sizes = [write_slides_page(tmp_path, [slide] * count).stat().st_size for count in (1, 60, 200)]
    assert 50_000 < sizes[0] < 200_000
    assert 4e6 < sizes[1] < 8e6 and 4e6 < sizes[2] < 8e6


@pytest.mark.slow
@pytest.mark.skipif(chromium.find() is None, reason="no chromium here (apt install chromium)")
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_shows_the_page_without_complaints(width, tmp_path):
    slides = [make_slide(tmp_path, name, score=0.5) for name in ("x" * 200, AWKWARD, "c")]
    slides.append(failed_slide("y" * 200, "z" * 500))
    file = write_slides_page(tmp_path, slides)
    shutil.rmtree(tmp_path / "slides")
    profile = tmp_path / "profile"
    with chromium.open_tab(profile) as tab:
        tab.open(file, width, "dark")
        assert tab.value("[...document.images].every(i => i.naturalWidth > 0)")
        assert tab.value("document.images.length") == 3
        assert tab.value("document.documentElement.scrollWidth <= innerWidth")
        assert tab.events_named("Log.entryAdded") == []
