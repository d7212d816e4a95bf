"""What --mode=froc says about slides and truth that are missing, damaged or named strangely."""

import json
import logging

import pytest

from bef_jax.errors import UserError
from bef_jax.report import froc_page
from bef_jax.slides.froc import evaluate_slides
from bef_jax.slides.froc.scored import read_scored
from tests.slides.truth_files import REFERENCE, SQUARE, hand_made, write_asap, write_run


def test_slides_that_failed_are_left_out_and_named(tmp_path, caplog):
    run, truth = hand_made(tmp_path)
    (run / "slides.csv").write_text(
        "name,file,status\na,a.tif,done\nb,b.tif,done\nc,c.tif,failed\nd,d.tif,done\n"
    )
    record = json.loads((run / "slides" / "d" / "slide.json").read_text())
    (run / "slides" / "d" / "slide.json").write_text(json.dumps(record | {"score": None}))
    with caplog.at_level(logging.WARNING, "bef_jax"):
        summary = evaluate_slides(run, truth)
    assert "slides that failed are left out (2): c, d" in caplog.text
    assert (summary["n_slides"], summary["n_failed"]) == (2, 2)
    assert "failed and are left out (2): c, d." in (run / "froc" / "index.html").read_text()


def test_a_slide_with_a_strange_name_in_a_folder(tmp_path):
    name = "case 1/=a<b>"
    run = write_run(tmp_path / "run", {name: {"detections": [(800, 800, 0.4)]}}, table=False)
    (run / "slides.csv").write_text(f"name,status\n{name},done\n")
    (tmp_path / "truth" / "case 1").mkdir(parents=True)
    write_asap(tmp_path / "truth" / f"{name}.xml", [("Tumor", SQUARE)])
    assert evaluate_slides(run, tmp_path / "truth")["froc"] == 1
    assert "&lt;b&gt;" in (run / "froc" / "index.html").read_text()


def test_truth_of_slides_that_were_not_scored_is_a_warning(tmp_path, caplog):
    run, truth = hand_made(tmp_path, REFERENCE + "e,Normal,None,None\n")
    write_asap(truth / "f.xml", [("Tumor", SQUARE)])
    with caplog.at_level(logging.WARNING, "bef_jax"):
        evaluate_slides(run, truth)
    assert "has 2 slides that were not scored: e, f" in caplog.text


def broken(run, truth, what):
    """Damages a file, and returns the words of the error."""
    slide = run / "slides" / "a" / "slide.json"
    record = json.loads(slide.read_text())
    match what:
        case "no truth":
            return run, truth / "missing", "--truth=.*no such folder"
        case "no slides":
            return run / "missing", truth, "has no scored slides"
        case "not done":
            (run / "slides" / "x" / ".partial").mkdir(parents=True)
            return run, truth, "x: is not scored to its end"
        case "gone":
            slide.unlink()
            return run, truth, "a: has no slide.json"
        case "damaged":
            slide.write_text("{}")
            return run, truth, "slide.json: damaged"
        case "classes":
            slide.write_text(json.dumps(record | {"classes": ["x", "y", "z"]}))
            return run, truth, "has 3 classes"
        case "mpp":
            slide.write_text(json.dumps(record | {"mpp": -1}))
            return run, truth, "slide.json: damaged"
        case "file":
            slide.write_text(json.dumps(record | {"file": ""}))
            return run, truth, "slide.json: damaged"
        case "score":
            slide.write_text(json.dumps(record | {"score": 7.0}))
            return run, truth, "slide.json: damaged"
        case "no detections":
            (slide.parent / "detections.csv").unlink()
            return run, truth, "detections.csv: is missing"
        case "no point":
            (slide.parent / "detections.csv").write_text("x,y,probability\n1,2,nan\n")
            return run, truth, "row 1 is no point"
        case "no number":
            (slide.parent / "detections.csv").write_text("x,y,probability\n1,2,b\n")
            return run, truth, "detections.csv: damaged"
        case "no column":
            (slide.parent / "detections.csv").write_text("x,y\n1,2\n")
            return run, truth, "detections.csv: damaged"
        case "not listed":
            (truth / "reference.csv").write_text("a,Tumor\nb,Tumor\nc,Normal\n")
            return run, truth, "reference.csv: lacks d"
        case "not drawn":
            (truth / "reference.csv").write_text("a,Tumor\nb,Tumor\nc,Tumor\nd,Normal\n")
            return run, truth, "no annotation of c, which has tumour"
        case "not normal":
            (truth / "reference.csv").write_text("a,Normal\nb,Tumor\nc,Normal\nd,Normal\n")
            return run, truth, "a.xml: has tumour, but reference.csv calls the slide normal"


@pytest.mark.parametrize(
    "what",
    ["no truth", "no slides", "not done", "gone", "damaged", "classes", "mpp", "score", "file"]
    + ["no detections", "no point", "no number", "no column"]
    + ["not listed", "not drawn", "not normal"],
)
def test_what_is_wrong_is_one_line(what, tmp_path):
    run, truth, words = broken(*hand_made(tmp_path), what)
    with pytest.raises(UserError, match=words) as error:
        evaluate_slides(run, truth)
    assert "\n" not in str(error.value)


def test_a_slide_that_reference_does_not_list_may_have_an_annotation(tmp_path):
    run, truth = hand_made(tmp_path, "c,Normal\nd,Normal\n")
    assert evaluate_slides(run, truth)["n_tumour_slides"] == 2


def test_one_annotation_is_not_that_of_two_slides(tmp_path):
    run = write_run(tmp_path / "run", {"x/a": {}, "y/a": {}})
    (tmp_path / "truth").mkdir()
    write_asap(tmp_path / "truth" / "a.xml", [("Tumor", SQUARE)])
    with pytest.raises(UserError, match="is the annotation of x/a and of y/a"):
        evaluate_slides(run, tmp_path / "truth")


def test_a_slide_whose_name_keeps_its_suffix_has_the_truth_of_its_stem(tmp_path):
    """Another slide lies in the folder a, so that the name of a.svs is not a."""
    changes = {"file": "a.svs", "detections": [(800, 800, 0.4)]}
    run = write_run(tmp_path / "run", {"a.svs": changes, "a/b": {}})
    (tmp_path / "truth").mkdir()
    write_asap(tmp_path / "truth" / "a.xml", [("Tumor", SQUARE)])
    assert evaluate_slides(run, tmp_path / "truth")["froc"] == 1
    (tmp_path / "truth" / "reference.csv").write_text("a.svs,Tumor\na/b.tif,Normal\n")
    assert evaluate_slides(run, tmp_path / "truth")["n_tumour_slides"] == 1


def test_without_slides_csv_all_slides_count(tmp_path):
    run, _ = hand_made(tmp_path)
    (run / "slides.csv").unlink()
    assert [slide.name for slide in read_scored(run)[0]] == ["a", "b", "c", "d"]


def test_a_page_of_many_lesions_shows_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(froc_page, "_MOST_ROWS", 3)
    run, truth = hand_made(tmp_path)
    evaluate_slides(run, truth)
    assert "lesions.csv has 1 more." in (run / "froc" / "index.html").read_text()
