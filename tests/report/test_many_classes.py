"""The report of more than two classes, whose page is parsed again, and its gallery."""

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, recall_score, roc_auc_score

from bef_jax.report import Content, write_report
from bef_jax.report.gallery import MISTAKES, RIGHT, SHOWN, contact_sheet, pick_of_many, show
from bef_jax.scoring.metrics import Evaluation
from bef_jax.scoring.multiclass import multiclass_metrics
from tests.report.conftest import NAMES, make_evaluation, make_many
from tests.report.test_report import Page, embedded

PLOTS = ["confusion_test", "confusion_valid", "loss", "reliability", "roc_test", "roc_valid",
         "validation"]  # fmt: skip


@pytest.fixture
def evaluations():
    return {
        split: make_many(n=60, split=split, seed=i) for i, split in enumerate(("valid", "test"))
    }


def page_of(folder, evaluations, **fields):
    content = {"history": [], "images": {}, "summary": {}} | fields
    return write_report(folder, Content(evaluations=evaluations, **content)).read_text()


def rows_of(page, width):
    """Returns the rows of `width` cells that begin with the number and the name of a class."""
    cells = Page(page).cells
    return [
        cells[start : start + width]
        for start, cell in enumerate(cells)
        if cell.isdigit() and cells[start + 1 : start + 2] and cells[start + 1] in NAMES
    ]


def test_writes_the_pictures_and_a_page_that_holds_them(tmp_path, evaluations, history, images):
    evaluations["test"] = make_many(n=60, split="test", seed=1)
    images = np.resize(images, (60, 96, 96, 3))
    fields = {"history": history, "images": {"valid": images}, "summary": {"params": 4010110}}
    page = page_of(tmp_path / "run" / "report", evaluations, **fields)
    written = sorted(path.name for path in (tmp_path / "run" / "report").iterdir())
    assert written == sorted(["index.html", "most_wrong.png", *(f"{name}.png" for name in PLOTS)])
    pictures = embedded(page)
    for name in PLOTS:
        assert (tmp_path / "run" / "report" / f"{name}.png").read_bytes() in pictures
    tiles = pictures[2 * len(PLOTS) :]
    shown = sum(len(rows) for rows in pick_of_many(evaluations["valid"]).values())
    assert [Image.open(io.BytesIO(tile)).size for tile in tiles] == [(96, 96)] * shown
    assert "<i>" not in page and "metastasis" not in page and "$" not in page.replace("$x_1$", "")


def test_the_figures_of_the_page_equal_scikit_learn_s(tmp_path, evaluations):
    page = page_of(tmp_path, evaluations)
    cells = Page(page).cells
    for seen in evaluations.values():
        labels, called = seen.labels, seen.probabilities.argmax(axis=1)
        auc = roc_auc_score(labels, seen.probabilities, multi_class="ovr")
        assert f"{auc:.4f}" in cells
        assert f"{accuracy_score(labels, called):.2%}" in cells
        assert f"{balanced_accuracy_score(labels, called):.2%}" in cells
    expected = []
    for seen in evaluations.values():
        called = seen.probabilities.argmax(axis=1)
        for number, name in enumerate(NAMES):
            truth = seen.labels == number
            rates = [recall_score(truth, called == number, pos_label=x) for x in (True, False)]
            auc = roc_auc_score(truth, seen.probabilities[:, number])
            figures = [f"{auc:.4f}", *(f"{rate:.2%}" for rate in rates)]
            expected.append([str(number), name, str(truth.sum()), *figures])
    assert rows_of(page, 6) == expected


def test_intervals_stand_beside_their_figures(tmp_path, evaluations):
    per_class = {"fat": {"auc": [0.1111, 0.2222], "sensitivity": [0.3, 0.4], "specificity": None}}
    ci95 = {"per_class": per_class, "macro_f1": [0.5, 0.6]}
    block = {"auc_ci95": [0.7, 0.8], "ci95": ci95}
    page = page_of(tmp_path, evaluations, summary={"valid": block})
    seen = evaluations["valid"].metrics
    cells = Page(page).cells
    assert f"{seen['auc']:.4f} (0.7000 to 0.8000)" in cells
    assert f"{seen['macro_f1']:.4f} (0.5000 to 0.6000)" in cells
    fat = seen["per_class"]["fat"]
    assert rows_of(page, 6)[0][3:] == [
        f"{fat['auc']:.4f} (0.1111 to 0.2222)",
        f"{fat['sensitivity']:.2%} (30.00% to 40.00%)",
        f"{fat['specificity']:.2%}",
    ]


def test_the_most_frequent_mistakes_are_counted(tmp_path):
    seen = make_many(n=500)
    cells = Page(page_of(tmp_path, {"valid": seen})).cells
    called = seen.probabilities.argmax(axis=1)
    counts = {
        (own, other): int(np.sum((seen.labels == own) & (called == other)))
        for own in range(5)
        for other in range(5)
        if own != other
    }
    (own, other), most = max(counts.items(), key=lambda item: item[1])
    row = [NAMES[own], NAMES[other], str(most), f"{most / np.sum(seen.labels == own):.1%}"]
    start = next(i for i in range(len(cells)) if cells[i : i + 2] == row[:2])
    assert cells[start : start + 4] == row


@pytest.mark.parametrize("temperature", [1.25, None])
def test_a_table_of_the_temperature_has_its_explanation(temperature, tmp_path, evaluations):
    block = {"calibrated": {"temperature": temperature, "loss": 0.1}, "operating_point": None}
    page = page_of(tmp_path, evaluations, summary={"valid": block})
    assert ("The temperature was chosen on valid" in page) == (temperature is not None)
    assert ("1.25" in Page(page).cells) == (temperature is not None)


def test_groups_change_the_note_about_intervals(tmp_path):
    seen = make_many()
    for groups, words in ((None, "intervals over patches"), (seen.ids, "intervals over groups")):
        seen = dataclasses.replace(seen, groups=groups)
        page = page_of(tmp_path, {"valid": seen})
        assert words in page and "There are none" not in page
    summary = {"valid": {"ci95": {"reason": "the split has one group only"}}}
    page = page_of(tmp_path, {"valid": seen}, summary=summary)
    assert "Intervals of valid are missing, because the split has one group only." in page


def test_of_very_many_classes_the_least_sensitive_are_listed(tmp_path):
    classes = tuple(f"class {i}" for i in range(300))
    seen = make_many(n=3000, classes=classes)
    page = page_of(tmp_path, {"valid": seen})
    assert len(page) < 3 << 20
    sensitivity = [seen.metrics["per_class"][name]["sensitivity"] for name in classes]
    cells = Page(page).cells
    pairs = itertools.pairwise(cells)
    listed = {int(cell) for cell, name in pairs if name == f"class {cell}"}
    order = sorted(range(300), key=lambda number: sensitivity[number])
    assert listed == set(order[:30])


def test_a_split_that_lacks_a_class_has_its_page(tmp_path):
    labels, classes = np.array([0, 1, 1, 0]), ("a", "b", "c")
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7], [0.4, 0.3, 0.3]])
    metrics, ids = multiclass_metrics(probabilities, labels, classes), np.array(list("wxyz"))
    seen = Evaluation("valid", ids, labels, probabilities, metrics, classes=classes)
    page = page_of(tmp_path, {"valid": seen}, images={"valid": np.zeros((4, 96, 96, 3), np.uint8)})
    cells = Page(page).cells
    assert cells[cells.index("c") :][:4] == ["c", "0", "-", "-"]


# ---- the gallery --------------------------------------------------------------------------------


def test_the_most_confident_patches_match_a_brute_force_sort():
    seen = make_many(n=300)
    called, top = seen.probabilities.argmax(axis=1), seen.probabilities.max(axis=1)
    found = pick_of_many(seen)
    assert list(found) == [MISTAKES, RIGHT]
    wrong = sorted((i for i in range(300) if called[i] != seen.labels[i]), key=lambda i: -top[i])
    assert found[MISTAKES].tolist() == wrong[: 2 * SHOWN]
    expected = []
    for number in range(5):
        right = [i for i in range(300) if called[i] == seen.labels[i] == number]
        expected += sorted(right, key=lambda i: -top[i])[:4]  # 24 // 5
    assert found[RIGHT].tolist() == expected


def test_of_many_classes_those_with_the_most_right_patches_are_shown():
    seen = make_many(n=3000, classes=tuple(f"class {i}" for i in range(100)))
    found = pick_of_many(seen)[RIGHT]
    assert len(found) == len(set(seen.labels[found])) == 24
    right = seen.labels[seen.probabilities.argmax(axis=1) == seen.labels]
    counts = np.sort(np.bincount(right, minlength=100))
    shown = np.bincount(right, minlength=100)[seen.labels[found]]
    assert sorted(shown) == counts[-24:].tolist()


def test_each_patch_is_explained_and_named_as_it_was_called(images):
    asked = []

    def explain(patches, called):
        asked.append((patches, called))
        return np.ones((len(patches), 96, 96), np.float32)

    seen = make_many(n=40)
    shown = show(seen, images, explain, 32)
    ((patches, called),) = asked
    rows = [seen.ids.tolist().index(each.id) for each in shown]
    np.testing.assert_array_equal(patches, images[rows])
    assert called.tolist() == seen.probabilities[rows].argmax(axis=1).tolist()
    assert [each.names for each in shown] == [
        (NAMES[seen.labels[row]], NAMES[number]) for row, number in zip(rows, called, strict=True)
    ]
    assert [each.probability for each in shown] == seen.probabilities[rows].max(axis=1).tolist()
    assert {each.is_wrong for each in shown if each.kind == MISTAKES} == {True}
    assert {each.is_wrong for each in shown if each.kind == RIGHT} == {False}


@pytest.mark.filterwarnings("error")
def test_the_contact_sheet_has_the_mistakes_with_both_names(images):
    shown = show(make_many(n=40), images, None)
    wrong = [each for each in shown if each.is_wrong]
    sheet = contact_sheet(shown)
    assert sheet.shape == (-(-len(wrong) // 4) * (192 + 6 + 3 * 22), 4 * (192 + 12), 3)
    assert wrong[0].caption.splitlines()[0] == f"p = {wrong[0].probability:.3f}"
    for each in wrong:
        _, own, called = each.caption.splitlines()
        assert own != called.removeprefix("called ")
    assert (sheet[192 + 6 : 192 + 6 + 3 * 22, :204] < 100).any()  # dark letters below the first


def test_large_patches_are_shrunk_on_the_page(tmp_path):
    seen = make_many(n=8)
    patches = np.zeros((8, 224, 224, 3), np.uint8)
    page = page_of(tmp_path, {"valid": seen}, images={"valid": patches})
    assert Image.open(io.BytesIO(embedded(page)[-1])).size == (128, 128)


def test_two_classes_with_other_names_are_called_by_them(tmp_path, images):
    labels, ids = np.array([0, 1, 1, 0]), np.array(list("abcd"))
    seen = make_evaluation(np.array([0.1, 0.9, 0.2, 0.7]), labels, ids)
    seen = dataclasses.replace(seen, classes=("benign", "HER2 positive"))
    page = page_of(tmp_path, {"valid": seen}, images={"valid": images})
    assert "metastasis" not in page and "normal" not in page.lower()
    assert "p is the probability of HER2 positive" in page
    assert "<h4>Benign, called HER2 positive <small>false positives" in page
    assert "<h4>HER2 positive, called benign <small>false negatives" in page
    assert "<th>called HER2 positive</th>" in page
