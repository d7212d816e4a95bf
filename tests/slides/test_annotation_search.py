"""Which file is the annotation of a slide, and what reference.csv says."""

import numpy as np
import pytest
import tifffile

from bef_jax.errors import UserError
from bef_jax.slides.annotations import annotated_names, find_annotation, read_reference, reference

GREY, COLOURS = np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)


def write(folder, *names):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if "tif" in name:
            tifffile.imwrite(file, COLOURS if "slide" in name else GREY)
        else:
            file.write_text("")


@pytest.mark.parametrize(
    "name",
    ["tumor_001.xml", "tumor_001.geojson", "tumor_001.GeoJSON.gz", "tumor_001.json"]
    + ["tumor_001.tif", "tumor_001.tiff", "tumor_001_mask.tif", "tumor_001_Mask.TIF"]
    + ["Tumor_001_Mask.tif", "tumor_001_evaluation_mask.tif"],
)
def test_names_of_annotations(name, tmp_path):
    write(tmp_path, name, "tumor_0011.xml", "tumor_00.xml", "tumor_001_2.xml", "tumor_001.svs")
    (tmp_path / "tumor_001.json.gz").mkdir()
    assert find_annotation(tmp_path, "tumor_001") == tmp_path / name
    assert find_annotation(tmp_path, "tumor_002") is None
    assert find_annotation(tmp_path / "missing", "tumor_001") is None


def test_two_candidates_are_refused(tmp_path):
    write(tmp_path, "a.xml", "a_mask.tif")
    with pytest.raises(UserError, match=r"a.xml and a_mask.tif are both annotations of a"):
        find_annotation(tmp_path, "a")


def test_the_slide_is_never_its_annotation(tmp_path):
    write(tmp_path, "slide.tif", "b.tif")
    assert find_annotation(tmp_path, "slide") is None  # it has colours
    assert find_annotation(tmp_path, "b", tmp_path / "b.tif") is None
    write(tmp_path, "slide_mask.tif", "b.xml")
    assert find_annotation(tmp_path, "slide").name == "slide_mask.tif"
    assert find_annotation(tmp_path, "b", tmp_path / "b.tif").name == "b.xml"
    (tmp_path / "c.tif").write_text("damaged")
    assert find_annotation(tmp_path, "c") is None


def test_slides_in_folders(tmp_path):
    write(tmp_path, "a.xml", "case1/a.xml")
    assert find_annotation(tmp_path, "case1/a") == tmp_path / "case1" / "a.xml"
    assert find_annotation(tmp_path, "case2/a") == tmp_path / "a.xml"


def test_names_that_have_an_annotation(tmp_path):
    write(tmp_path, "a.xml", "B_Mask.tif", "c_evaluation_mask.tif", "slide.tif", "reference.csv")
    write(tmp_path, "d.geojson", "e.geojson.gz", "notes.txt", "x/y.xml")
    assert annotated_names(tmp_path) == {"a", "B", "c", "d", "e"}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("test_001,Tumor,IDC,Macro\ntest_003,Normal,None,None\n",
         {"test_001": (True, "macro"), "test_003": (False, "none")}),
        ("image,type\r\na.tif,Tumor\r\nb.svs,normal\r\n",
         {"a": (True, None), "b": (False, "none")}),
        ("name,label\na.svslide,1\nb.png,0\nc.d,0\n",
         {"a": (True, None), "b": (False, "none"), "c.d": (False, "none")}),
        ("patient,stage\npatient_000.zip,pN1\npatient_000_node_0.tif,negative\n"
         "patient_000_node_1.tif,itc\npatient_000_node_2.tif,macro\n",
         {"patient_000_node_0": (False, "none"), "patient_000_node_1": (True, "ITC"),
          "patient_000_node_2": (True, "macro")}),
        ("patient_000.zip,pN0\npatient_000_node_0.tif,micro\n",
         {"patient_000_node_0": (True, "micro")}),
        ("class,label,slide\nmicro,1,case1/a.ndpi\n,0,b 1.2\n",
         {"case1/a": (True, "micro"), "b 1.2": (False, "none")}),
        ("\ufeffname,label\na,tumour\n", {"a": (True, None)}),
        ("name,label\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_reference(text, right, tmp_path):
    (tmp_path / "reference.csv").write_text(text, encoding="utf-8")
    found = read_reference(tmp_path)
    assert {name: tuple(label) for name, label in found.items()} == right


def test_no_reference(tmp_path):
    assert read_reference(tmp_path) is None


def test_a_long_reference_is_refused_and_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "_LONGEST", 20)
    # 24 bytes in UTF-8, but 20 letters.
    (tmp_path / "reference.csv").write_text("éééé,Tumor\nb,Normal\n"[:20], encoding="utf-8")
    with pytest.raises(UserError, match="is longer than"):
        read_reference(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a,Tumor\na.tif,Normal\n", "a occurs twice"),
        (b"a,maybe\n", "a has the label 'maybe'"),
        (b"a\n", "a has the label ''"),
        (b"a,Tumor,IDC,Mikro\n", "a has the class 'mikro'"),
        (b"a,Tumor,IDC,None\n", "a is called tumor and none"),
        (b"a,Normal,None,Micro\n", "a is called normal and micro"),
        (b"name,colour\na,red\n", "no column type"),
        (b"a,\xff\n", "cannot be read"),
        (b"\0" * 200_000, "reference.csv: "),
        (b'a,"' + b"x" * 200_000, "cannot be read"),
    ],
)
def test_a_bad_reference_is_one_line(text, words, tmp_path):
    (tmp_path / "reference.csv").write_bytes(text)
    with pytest.raises(UserError, match=words) as error:
        read_reference(tmp_path)
    assert "reference.csv" in str(error.value) and "\n" not in str(error.value)
