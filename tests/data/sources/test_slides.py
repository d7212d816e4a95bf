"""Patches drawn from slides whose pixels say the truth: what is tumour has a colour of its own."""

import csv
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from bef_jax.data import sources, store
from bef_jax.data.sources.slides import drawing, finding
from tests.data.sources.conftest import expect_error
from tests.memory import growth_of
from tests.slides.slide_files import GLASS, break_tile, write_pyramid, write_sparse

SIDE, CENTER = 96, 32
WIDTH, HEIGHT = 500, 420  # at the network's scale; no multiple of a window
MPP = 0.486  # level 1 has 0.972
TUMOUR = (250, 10, 40)


def paint(seed, tumour=True):
    """Returns a slide at the network's scale, uint8 [H, W, 3]: glass, tissue, and spots of tumour.

    Tissue has noise, so that no two patches are equal.
    """
    rng = np.random.default_rng(seed)
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:] = GLASS
    top, left = rng.integers(0, 60, 2)
    noise = rng.integers(0, 40, (HEIGHT - top, WIDTH - left - 64, 3))
    pixels[top:, left : WIDTH - 64] = noise + (140, 60, 130)
    if tumour:
        for x, y, radius in rng.integers((left, top, 15), (WIDTH - 64, HEIGHT, 70), (6, 3)):
            rows, columns = np.ogrid[:HEIGHT, :WIDTH]
            spot = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            pixels[spot & (pixels[..., 1] < 200)] = TUMOUR
    return pixels


def truth(pixels):
    return (pixels == TUMOUR).all(axis=-1)


def write_slide(path, pixels, mask=True):
    """Writes a pyramid whose second level is `pixels`, and a mask if there is tumour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pyramid(
        path, pixels.repeat(2, 0).repeat(2, 1), MPP, (1, 2), compression="deflate", tile=64
    )
    if mask and truth(pixels).any():
        tifffile.imwrite(
            path.with_name(f"{path.stem}_mask.tif"), truth(pixels).astype(np.uint8) * 255
        )
    return pixels


NAMES = {f"{kind}_{i}": kind == "tumor" for kind in ("tumor", "normal") for i in range(5)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a folder of ten slides, of which five have tumour, and their pixels by name."""
    folder = tmp_path_factory.mktemp("slides")
    return folder, {
        name: write_slide(folder / f"{name}.tif", paint(i, has))
        for i, (name, has) in enumerate(NAMES.items())
    }


@pytest.fixture
def make(make_data):
    """Returns make(folder, **fields): config.data of these slides."""
    ratio = {"split_ratio": (0.6, 0.2, 0.2), "slide_patches": 300}
    return lambda folder, **fields: make_data("slides", folder, **(ratio | fields))


def read(data):
    """Returns {split: [(pixels, label, id, group)]} of all patches, in their order."""
    found = {}
    for split, chunk in sources.open_source(data).chunks:
        rows = zip(chunk.images, chunk.labels, chunk.ids, chunk.groups, strict=True)
        found.setdefault(split, []).extend(rows)
    return found


def everything(found):
    return [(split, *row) for split, rows in found.items() for row in rows]


def same(found, other):
    rows, others = everything(found), everything(other)
    return len(rows) == len(others) and all(
        (a[0], *a[2:]) == (b[0], *b[2:]) and np.array_equal(a[1], b[1])
        for a, b in zip(rows, others, strict=True)
    )


def cut(pixels, name, side=SIDE, center=CENTER, factor=2):
    """Returns the patch with this id straight from the slide; outside is the mirror image."""
    x, y = (int(part.partition("=")[2]) // factor for part in name.split(":")[-2:])
    margin = (side - center) // 2
    rows, columns = (
        np.pad(np.arange(length), 2 * side, "reflect")[start - margin + 2 * side :][:side]
        for start, length in ((y, HEIGHT), (x, WIDTH))
    )
    return pixels[rows[:, None], columns]


@pytest.fixture(scope="module")
def drawn(made):
    from bef_jax.configs.default import get_config

    data = get_config().data
    data.update({"source": "slides", "dir": str(made[0]), "slide_patches": 300})
    data.split_ratio = (0.6, 0.2, 0.2)
    return read(data)


# ---- what a patch is ----------------------------------------------------------------------------


def test_each_label_is_what_the_middle_of_the_patch_shows(made, drawn):
    labels = []
    for _, image, label, _, _ in everything(drawn):
        middle = image[32:64, 32:64]
        inside = truth(middle).any()
        assert inside == label
        labels.append(label)
    assert 0 < sum(labels) < len(labels)


def test_pixels_are_those_at_the_place_that_the_id_names(made, drawn):
    for _, image, _, name, group in everything(drawn):
        assert name.startswith(f"{group}:x=")
        np.testing.assert_array_equal(image, cut(made[1][group], name))


def test_an_edge_may_be_tumour_only_inside_of_the_slide(make, tmp_path):
    """The last windows reach past the edge. There the mirror image decides nothing."""
    pixels = paint(0, tumour=False)
    pixels[:, 480:] = TUMOUR
    pixels[:, :480][truth(pixels[:, :480])] = 0
    for i in range(3):
        write_slide(tmp_path / f"t{i}.tif", np.where(truth(pixels)[..., None], pixels, paint(i, 0)))
        write_slide(tmp_path / f"n{i}.tif", paint(10 + i, tumour=False))
    rows = everything(read(make(tmp_path, slide_patches=2000)))
    positive = {int(name.split("x=")[1].split(":")[0]) for *_, label, name, _ in rows if label}
    assert positive == {480 * 2}


def test_glass_is_never_taken(drawn):
    for _, image, _, _, _ in everything(drawn):
        middle = image[32:64, 32:64].astype(float)
        most, least = middle.max(-1), middle.min(-1)
        assert ((most - least) / most).max() >= 0.07


@pytest.mark.parametrize(("side", "center"), [(96, 32), (64, 32), (128, 64), (64, 0), (33, 11)])
def test_side_and_center_are_those_of_the_configuration(side, center, make, made):
    folder, pixels = made
    fields = {"patch_size": side, "slide_center": center, "slide_patches": 120}
    rows = everything(read(make(folder, **fields)))
    center = center or side
    margin = (side - center) // 2
    for _, image, label, name, group in rows:
        assert truth(image[margin : margin + center, margin : margin + center]).any() == label
        np.testing.assert_array_equal(image, cut(pixels[group], name, side, center))
    assert {image.shape for _, image, *_ in rows} == {(side, side, 3)}


# ---- how many of what ---------------------------------------------------------------------------


def test_each_split_has_its_share_and_half_of_it_is_tumour(drawn):
    counts = {split: len(rows) for split, rows in drawn.items()}
    assert counts == {"test": 60, "valid": 60, "train": 180}
    for rows in drawn.values():
        assert sum(label for _, label, _, _ in rows) == len(rows) // 2


def test_each_part_of_a_split_has_both_classes(drawn):
    labels = np.array([label for _, label, _, _ in drawn["train"]])
    assert (labels.reshape(-1, 2).sum(axis=1) == 1).all()


def test_slides_of_a_split_give_equally_many_of_a_class(drawn):
    for rows in drawn.values():
        for wanted in (0, 1):
            groups = [group for _, label, _, group in rows if label == wanted]
            counts = [groups.count(group) for group in set(groups)]
            assert max(counts) - min(counts) <= 1
    normals = {group for _, label, _, group in drawn["train"] if not label}
    assert len({group.split("_")[0] for group in normals}) == 2  # slides with tumour give both


def test_what_a_slide_lacks_comes_from_the_others(make, tmp_path):
    few = paint(0, tumour=False)
    few[100:130, 100:130] = TUMOUR  # four windows at most
    folders = {"train": [few, paint(1), paint(2)], "valid": [paint(3)]}
    for split, all_pixels in folders.items():
        for i, pixels in enumerate(all_pixels):
            write_slide(tmp_path / split / f"s{i}.tif", pixels)
    rows = read(make(tmp_path, train_size=80, slide_patches=2000))["train"]
    groups = [group for _, label, _, group in rows if label]
    counts = sorted(groups.count(f"train/s{i}") for i in range(3))
    assert sum(counts) == 40 and counts[0] <= 4 and counts[2] - counts[1] <= 1


def test_what_a_slide_of_glass_lacks_comes_from_the_others(make, tmp_path):
    """How much tissue a slide has is only known when its windows are read."""
    bare = np.full((HEIGHT, WIDTH, 3), GLASS, np.uint8)
    bare[64:96, 64:128] = paint(0, tumour=False)[200:232, 200:264]  # two windows
    for i, pixels in enumerate([bare, paint(1, tumour=False), paint(2), paint(3)]):
        write_slide(tmp_path / "train" / f"s{i}.tif", pixels)
    write_slide(tmp_path / "valid" / "v.tif", paint(4))
    contents = sources.open_source(make(tmp_path, slide_patches=200, train_size=120))
    labels = {s: chunk.labels for s, chunk in contents.chunks}
    rows = csv.DictReader(contents.tables()["slides.csv"].splitlines())
    counts = {row["name"]: int(row["normal_patches"]) for row in rows}
    assert (labels["train"] == 0).sum() == 60
    assert counts["train/s0"] == 2
    others = [counts[f"train/s{i}"] for i in (1, 2, 3)]
    assert sum(others) == 58 and max(others) - min(others) <= 1


def test_slides_are_drawn_from_in_an_order_that_their_names_do_not_decide(drawn):
    order = list(dict.fromkeys(group for _, label, _, group in drawn["train"] if not label))
    assert order != sorted(order) and order != sorted(order)[::-1]


def test_no_group_is_in_two_splits_and_ids_are_unique(drawn):
    groups = [{group for *_, group in rows} for rows in drawn.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 10
    names = [name for _, _, _, name, _ in everything(drawn)]
    assert len(set(names)) == len(names)


def test_each_split_has_slides_with_and_without_tumour(drawn):
    for rows in drawn.values():
        assert {group.split("_")[0] for *_, group in rows} == {"tumor", "normal"}


def test_a_pattern_makes_groups_of_slides(make, made):
    rows = read(make(made[0], group=r"_(\d)", split_ratio=(0.6, 0.4, 0)))
    groups = {split: {group for *_, group in found} for split, found in rows.items()}
    assert groups["train"] | groups["valid"] == set("01234")
    assert not groups["train"] & groups["valid"]


# ---- always the same ----------------------------------------------------------------------------


def test_the_order_of_files_and_threads_and_chunks_change_nothing(make, made, drawn, monkeypatch):
    find = finding.find_slides
    monkeypatch.setattr(finding, "find_slides", lambda *args: find(*args)[::-1])
    monkeypatch.setattr(drawing, "cores", lambda: 7)
    monkeypatch.setattr(drawing, "_FEWEST_READ", 31)
    assert same(read(make(made[0])), drawn)


def test_another_folder_gives_the_same_and_another_seed_does_not(make, made, drawn, tmp_path):
    shutil.copytree(made[0], tmp_path / "copy")
    assert same(read(make(tmp_path / "copy")), drawn)
    other = read(make(made[0], seed=1))
    assert {name for *_, name, _ in everything(other)} != {
        name for *_, name, _ in everything(drawn)
    }


def test_a_store_after_an_interruption_is_the_same(make, made, tmp_path, monkeypatch):
    whole = store.prepare(make(made[0], store=str(tmp_path / "whole")))
    read_block, calls = drawing.read_block, []

    def fail(*args):
        calls.append(args)
        if len(calls) > 200:
            raise KeyboardInterrupt
        return read_block(*args)

    data = make(made[0], store=str(tmp_path / "again"))
    with monkeypatch.context() as patched:
        patched.setattr(drawing, "read_block", fail)
        with pytest.raises(KeyboardInterrupt):
            store.prepare(data)
    again = store.prepare(data)
    assert again["files"] == whole["files"] and again["content"] == whole["content"]


# ---- the store ----------------------------------------------------------------------------------


def test_the_store_says_what_came_from_where(make, made, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = make(made[0], store=str(tmp_path / "store"))
    manifest = store.prepare(data)
    assert manifest["mpp"] == 0.972 and manifest["classes"] == ["normal", "metastasis"]
    assert manifest["groups"]["shared"] == 0
    with open(tmp_path / "store" / "slides.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"]: row["annotation"] for row in rows} == {
        name: f"{name}_mask.tif" if has else "" for name, has in NAMES.items()
    }
    for split, counts in manifest["class_counts"].items():
        own = [row for row in rows if row["split"] == split]
        for column, count in zip(("normal_patches", "tumour_patches"), counts, strict=True):
            assert sum(int(row[column]) for row in own) == count
    assert sum(int(row["glass"]) for row in rows) > 0
    assert "5 of 10 slides have no annotation and count as normal: normal_0, " in caplog.text
    assert "train: 90 patches with tumour from 3 slides" in caplog.text


def test_an_edited_annotation_is_noticed(make, made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    data = make(folder)
    store.prepare(data)
    store.prepare(data)
    outline = {"type": "Polygon", "coordinates": [[[0, 0], [400, 0], [400, 400], [0, 0]]]}
    (folder / "normal_0.geojson").write_text(
        json.dumps({"type": "Feature", "properties": {}, "geometry": outline})
    )
    expect_error(data, "has changed since the store", read=lambda data: [store.prepare(data)])


def test_folders_behind_links_count_as_others_do(make, made, tmp_path):
    there = shutil.copytree(made[0], tmp_path / "there")
    folder = tmp_path / "slides"
    folder.mkdir()
    (folder / "linked").symlink_to(there)
    data = make(folder)
    before = sources.identity(data)
    mask = there / "tumor_3_mask.tif"
    tifffile.imwrite(mask, np.zeros((HEIGHT, WIDTH + 1), np.uint8))
    assert sources.identity(data) != before
    mask.rename(there / "tumor_9_mask.tif")
    expect_error(data, f"{folder / 'linked' / 'tumor_9_mask.tif'}: is the annotation of no slide")


@pytest.mark.slow
def test_a_network_is_trained_on_the_store(made, small_config, tmp_path):
    from bef_jax import train

    own = {"data.source": "slides", "data.slide_patches": 400, "data.store": str(tmp_path / "s")}
    own |= {"data.split_ratio": (0.6, 0.2, 0.2)}
    sizes = dict.fromkeys(("data.train_size", "data.valid_size", "data.test_size"))
    config = small_config(steps=2, **{"data.dir": str(made[0])} | own | sizes)
    summary = train.train_and_evaluate(config, tmp_path / "run")
    assert summary["step"] == 2
    assert summary["valid"]["ci95"]["resampled"] == "groups"


# ---- folders and annotations --------------------------------------------------------------------


def test_folders_of_splits_are_kept(make, made, tmp_path):
    for name in NAMES:
        split = {"0": "test", "1": "val"}.get(name[-1], "train")
        for file in made[0].glob(f"{name}*"):
            (tmp_path / split / "deep").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / split / "deep")
    found = read(make(tmp_path))
    groups = {split: {group for *_, group in rows} for split, rows in found.items()}
    assert groups["test"] == {"test/deep/tumor_0", "test/deep/normal_0"}
    assert groups["valid"] == {"val/deep/tumor_1", "val/deep/normal_1"}
    assert len(groups["train"]) == 6
    shutil.move(tmp_path / "val", tmp_path / "train" / "more")
    assert read(make(tmp_path)).keys() == {"test", "valid", "train"}


def test_a_train_folder_whose_slides_are_all_left_out_is_an_error(make, made, tmp_path):
    for name, split in {"tumor_0": "valid", "normal_0": "valid", "normal_1": "train"}.items():
        (tmp_path / split).mkdir(exist_ok=True)
        for file in made[0].glob(f"{name}*"):
            shutil.copy(file, tmp_path / split)
    # Its tumour is known, but not where it is.
    (tmp_path / "reference.csv").write_text("normal_1,Tumor\ntumor_0,Tumor\nnormal_0,Normal\n")
    expect_error(make(tmp_path), "no slide of train has normal tissue")
    shutil.move(tmp_path / "valid", tmp_path / "test")
    expect_error(make(tmp_path), "no slide of train has normal tissue")


def test_annotations_may_lie_in_a_folder_of_their_own(make, made, drawn, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    (folder / "annotations").mkdir()
    for file in folder.glob("*_mask.tif"):
        file.rename(folder / "annotations" / file.name)
    assert same(read(make(folder, annotations=str(folder / "annotations"))), drawn)
    shutil.move(folder / "annotations", tmp_path / "elsewhere")
    assert same(read(make(folder, annotations=str(tmp_path / "elsewhere"))), drawn)


def test_two_slides_of_one_stem_keep_their_suffix(make, made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    shutil.copy(folder / "normal_1.tif", folder / "normal_0.tiff")
    groups = {group for *_, group in everything(read(make(folder, rectify=False)))}
    assert {"normal_0.tif", "normal_0.tiff", "normal_1"} <= groups and "normal_0" not in groups


def test_two_slides_may_not_share_an_annotation(make, made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    shutil.copy(folder / "tumor_0.tif", folder / "tumor_0.tiff")
    expect_error(make(folder), "tumor_0_mask.tif: could be of ", "tumor_0.tiff")


def test_a_json_file_beside_the_slides_may_be_anything(make, made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    (folder / "server.json").write_text("[]")
    sources.open_source(make(folder))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("tumor_9.xml", ""), ("tumor_9.geojson", ""), ("tumor_9_mask.tif", "")),
        *(("tumor_9.xml", "annotations"), ("tumor_9.tif", "annotations")),
    ],
)
def test_an_annotation_of_no_slide_is_an_error(name, place, make, made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    target = folder / place
    target.mkdir(exist_ok=True)
    if place:
        for file in folder.glob("*_mask.tif"):
            file.rename(target / file.name)
    shutil.copy(target / "tumor_0_mask.tif", target / name)
    fields = {"annotations": str(target)} if place else {}
    expect_error(make(folder, **fields), f"{target / name}: is the annotation of no slide")


# ---- mistakes -----------------------------------------------------------------------------------


def test_a_slide_without_a_scale_is_refused_until_it_is_given(make, tmp_path):
    for i in range(4):
        pixels = write_slide(tmp_path / f"s{i}.tif", paint(i))
        write_pyramid(
            tmp_path / f"s{i}.tif", pixels.repeat(2, 0).repeat(2, 1), None, (1, 2), 64, "deflate"
        )
    fields = {"split_ratio": (0.5, 0.25, 0.25), "slide_patches": 80}
    expect_error(make(tmp_path, **fields), "s0.tif", "slides.mpp")
    assert len(everything(read(make(tmp_path, slide_mpp=MPP, **fields)))) == 80


def test_a_coarse_slide_is_refused(make, made):
    expect_error(make(made[0], mpp=0.25), "coarser")


def test_undecodable_windows_are_left_out_and_counted(make, made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    break_tile(folder / "tumor_0.tif", 1, 3, 3)
    contents = sources.open_source(make(folder, slide_patches=3000))
    names = [name for _, chunk in contents.chunks for name in chunk.ids]
    row = next(r for r in csv.DictReader(contents.tables()["slides.csv"].splitlines())
               if r["name"] == "tumor_0")  # fmt: skip
    # The tile has the pixels 192 .. 255 both ways. Windows begin at multiples of 32, and what is
    # read for them begins 32 before.
    touching = {(x, y) for x in range(160, 288, 32) for y in range(160, 288, 32)}
    assert int(row["failed"]) == len(touching)
    places = {tuple(int(part[2:]) // 2 for part in name.split(":")[1:])
              for name in names if name.startswith("tumor_0:")}  # fmt: skip
    assert places and not places & touching


def test_folders_that_cannot_be_used(make, made, tmp_path):
    expect_error(make(tmp_path / "absent"), "no such folder", "config.data.dir")
    (tmp_path / "empty").mkdir()
    expect_error(make(tmp_path / "empty"), "no slide")
    expect_error(make(made[0], annotations=str(tmp_path / "absent")), "config.data.annotations")
    for i in range(3):
        write_slide(tmp_path / "normal" / f"n{i}.tif", paint(i, tumour=False))
    expect_error(make(tmp_path / "normal"), "no slide has an annotation with tumour")
    full = np.full((HEIGHT, WIDTH, 3), TUMOUR, np.uint8)
    for i in range(3):
        write_slide(tmp_path / "tumour" / f"t{i}.tif", full)
    expect_error(make(tmp_path / "tumour"), "none is normal")


def test_too_few_slides_or_patches(make, tmp_path):
    write_slide(tmp_path / "a.tif", paint(0))
    write_slide(tmp_path / "b.tif", paint(1, tumour=False))
    expect_error(make(tmp_path), "of 2 slides", "use more slides")
    write_slide(tmp_path / "c.tif", paint(2))
    write_slide(tmp_path / "d.tif", paint(3))
    fields = {"slide_patches": 4, "split_ratio": (0.6, 0.2, 0.2)}
    expect_error(make(tmp_path, **fields), "patches for the", "slide_patches")


def test_fields_of_the_source_are_for_no_other(make, make_data, made):
    expect_error(make_data("image_folder", made[0], annotations="x"), "config.data.annotations")
    expect_error(make_data("npz", made[0], slide_patches=10), "config.data.slide_patches")
    expect_error(make(made[0], resize="side"), "config.data.resize")
    expect_error(make(made[0], classes=("a", "b", "c")), "2 classes")
    expect_error(make(made[0], classes=("metastasis", "normal")), "label 0")


def test_a_broken_slide_is_named(make, made, tmp_path, caplog):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    (folder / "normal_3.tif").write_bytes(b"II*\0 not a slide")
    assert "normal_3" not in {group for *_, group in everything(read(make(folder)))}
    assert f"1 files are no slides: {folder / 'normal_3.tif'}" in caplog.text
    (folder / "normal_3.tif").rename(folder / "normal_3.svs")
    expect_error(make(folder), "normal_3.svs")


# ---- reference.csv ------------------------------------------------------------------------------


@pytest.fixture
def with_reference(make, made, tmp_path):
    """Returns with_reference(**labels): config.data of the slides beside such a reference.csv."""
    folder = shutil.copytree(made[0], tmp_path / "slides")
    labels = {name: "Tumor" if has else "Normal" for name, has in NAMES.items()}

    def write(**changes):
        rows = {name: label for name, label in (labels | changes).items() if label}
        text = "".join(f"{name},{label},None,None\n" for name, label in rows.items())
        (folder / "reference.csv").write_text(text.replace("Tumor,None,None", "Tumor,IDC,Macro"))
        return make(folder)

    return write


def test_a_reference_that_agrees_changes_nothing(with_reference, drawn):
    assert same(read(with_reference()), drawn)


def test_tumour_without_annotation_is_left_out(with_reference, caplog):
    found = read(with_reference(normal_2="Tumor"))
    assert "normal_2" not in {group for *_, group in everything(found)}
    assert "1 slides with tumour are left out" in caplog.text and "normal_2" in caplog.text


def test_a_reference_knows_slides_of_one_stem_by_it(make, made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "slides")
    shutil.copy(folder / "normal_1.tif", folder / "normal_0.tiff")
    rows = (f"{name}.tif,{'Tumor' if has else 'Normal'}\n" for name, has in NAMES.items())
    (folder / "reference.csv").write_text("".join(rows))
    groups = {group for *_, group in everything(read(make(folder, rectify=False)))}
    assert {"normal_0.tif", "normal_0.tiff"} <= groups


def test_a_reference_that_contradicts_or_lacks_a_slide_is_an_error(with_reference):
    expect_error(
        with_reference(tumor_1="Normal"), "tumor_1_mask.tif: has tumour, but reference.csv"
    )
    expect_error(with_reference(normal_1=None), "reference.csv: lacks normal_1")
    assert len(everything(read(with_reference(tumor_1=None)))) == 300  # its annotation says it


# ---- drawing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_even_as_far_as_each_can(seed):
    rng = np.random.default_rng(seed)
    limits = rng.integers(0, 30, rng.integers(1, 9))
    wanted = int(rng.integers(0, 150))
    expected, left = [0] * len(limits), wanted
    while left and any(e < n for e, n in zip(expected, limits, strict=True)):
        for i, limit in enumerate(limits):
            if left and expected[i] < limit:
                expected[i], left = expected[i] + 1, left - 1
    assert drawing.even_shares(wanted, limits) == expected


# ---- large and real slides ----------------------------------------------------------------------


@pytest.mark.slow
def test_memory_does_not_grow_with_the_slide(make, tmp_path):
    """At the network's scale the annotation of one of these would take 400 MB."""
    outline = [[20_000, 20_000], [44_000, 20_000], [44_000, 44_000], [20_000, 20_000]]
    feature = {"geometry": {"type": "Polygon", "coordinates": [outline]}, "properties": {}}
    for name in "ab":
        write_sparse(tmp_path / f"{name}.tif", side=80_000)
        (tmp_path / f"{name}.geojson").write_text(json.dumps({"type": "Feature"} | feature))
    data = make(tmp_path, split_ratio=(0.5, 0.5, 0), slide_patches=400)
    assert growth_of(lambda: read(data)) < 350 << 20


def test_a_real_slide(make, tmp_path):
    folder = os.environ.get("BEF_SLIDES_DIR")
    if not folder:
        pytest.skip("BEF_SLIDES_DIR does not name the folder of real slides")
    outline = [[600, 900], [1500, 900], [1500, 1900], [600, 1900], [600, 900]]
    for name in "abcd":
        shutil.copy(Path(folder, "cmu_small_region.svs"), tmp_path / f"{name}.svs")
    feature = {"geometry": {"type": "Polygon", "coordinates": [outline]}, "properties": {}}
    for name in "ab":
        (tmp_path / f"{name}.geojson").write_text(json.dumps({"type": "Feature"} | feature))
    found = read(make(tmp_path, split_ratio=(0.5, 0.5, 0), slide_patches=200))
    for _, _, label, name, group in everything(found):
        x, y = (int(part.partition("=")[2]) for part in name.split(":")[-2:])
        side = 32 * 0.972 / 0.499  # in pixels of the slide
        touches = 600 - side < x < 1500 and 900 - side < y < 1900 and group in "ab"
        assert touches == label or min(abs(x - 600 + side), abs(y - 900 + side)) < 3
    assert {name: len(rows) for name, rows in found.items()} == {"valid": 100, "train": 100}
