"""Names of classes in plots and in the names of files."""

import pytest

from bef_jax.scoring.class_names import drawn_names, file_name, positive_name


def test_plain_names_stay_as_they_are():
    assert drawn_names(["fat", "Größe", "ткань"]) == ["fat", "Größe", "ткань"]


def test_names_that_cannot_be_drawn_or_told_apart_have_their_number():
    long = "a" * 30
    names = drawn_names(
        ["\U0001f52c", "正常", f"{long}b{long}", f"{long}c{long}", "x\ny", "\U0001f52c z"]
    )
    assert names[:2] == ["class 0", "class 1"]
    assert names[2:4] == [f"class {i} {'a' * 11}…{'a' * 11}" for i in (2, 3)]
    assert names[4:] == ["x\\ny", "z"]
    assert len(set(names)) == 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fat", "3_fat"), ("a/b\\..", "3_a_b___"), ("\U0001f52c", "3__"), ("正常", "3_正常"),
     ("x" * 300, "3_" + "x" * 60), ("正" * 300, "3_" + "正" * 20), ("CON:", "3_CON_"),
     ("\0\n\udcff", "3____"), ("", "3_")],
)  # fmt: skip
def test_the_name_of_a_file_is_short_and_has_no_other_characters(name, expected):
    classes = ["0", "1", "2", name]
    assert file_name(3, classes) == expected


def test_names_of_files_differ_without_their_case_and_sort_by_number():
    classes = ["Tumour", "tumour", "TUMOUR", *"abcdefgh"]
    names = [file_name(number, classes) for number in range(len(classes))]
    assert len({name.lower() for name in names}) == len(classes)
    assert names == sorted(names)


def test_pcam_s_positive_class_has_its_article():
    assert positive_name(("normal", "metastasis")) == "a metastasis"
    assert positive_name(["benign", "malignant"]) == "malignant"
