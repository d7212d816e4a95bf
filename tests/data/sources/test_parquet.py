"""Parquet files as Hugging Face's data sets have them, with mistakes, and from a local hub."""

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bef_jax.data import sources
from bef_jax.data.sources import parquet as source
from bef_jax.data.sources.parquet.footer import largest_page, read_footer
from bef_jax.errors import UserError
from tests.data.sources.conftest import expect_error
from tests.hub_server import environment, serve
from tests.memory import growth_of

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: '.[hub]'")
pq = pytest.importorskip("pyarrow.parquet")

COUNTS = {"train": 8, "valid": 4, "test": 4}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(number):
    """Returns a PNG whose pixels are all `number`."""
    file = io.BytesIO()
    Image.new("RGB", (96, 96), (number,) * 3).save(file, "png")
    return file.getvalue()


def table_of(numbers, labels=None, paths=None, names=None, label_type=None, **columns):
    """Returns a table of the pictures with these numbers, whose labels are the numbers' parity."""
    labels = pa.array([number % 2 for number in numbers] if labels is None else labels)
    labels = labels.cast(label_type or labels.type)
    paths = [None] * len(numbers) if paths is None else paths
    images = [
        {"bytes": picture(number), "path": path}
        for number, path in zip(numbers, paths, strict=True)
    ]
    feature = {"dtype": "int64", "_type": "Value"}
    if names:
        feature = {"names": names, "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, "label": feature}
    arrays = {"image": pa.array(images, IMAGE), "label": labels} | columns
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(arrays).replace_schema_metadata(metadata)


def write_splits(
    folder, pattern="data/{split}-{shard:05d}-of-00002-0123456789abcdef.parquet", **kw
):
    """Writes two files for each split; the pictures of all are numbered through."""
    first = 0
    for split, count in COUNTS.items():
        for shard in range(2):
            numbers = range(first, first + count // 2)
            path = folder / pattern.format(split=split, shard=shard)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table_of(numbers, **kw), path, row_group_size=3)
            first += count // 2
    return folder


def read(data):
    """Returns the classes, and {split: [(first pixel, label, id, group)]}."""
    contents = sources.open_source(data)
    found = {}
    for split, chunk in contents.chunks:
        groups = [None] * len(chunk.ids) if chunk.groups is None else chunk.groups.tolist()
        pixels = chunk.images[:, 0, 0, 0].tolist()
        rows = zip(pixels, chunk.labels.tolist(), chunk.ids.tolist(), groups, strict=True)
        found.setdefault(split, []).extend(rows)
    return contents.classes, found


NUMBERS = {"test": [12, 13, 14, 15], "valid": [8, 9, 10, 11], "train": list(range(8))}


def numbers_of(found):
    return {split: [row[0] for row in rows] for split, rows in found.items()}


@pytest.mark.parametrize("label_type", [pa.bool_(), pa.int64(), pa.uint8()])
def test_the_layout_of_1aurent_patchcamelyon(label_type, tmp_path, make_data):
    """Its labels are bool, without names, and its paths are empty."""
    data = make_data("parquet", write_splits(tmp_path, label_type=label_type))
    classes, found = read(data)
    assert classes == ("0", "1")
    assert list(found) == ["test", "valid", "train"] and numbers_of(found) == NUMBERS
    assert all(label == number % 2 for rows in found.values() for number, label, *_ in rows)
    assert [row[2] for row in found["valid"]] == [
        f"valid-{shard:05d}-of-00002-0123456789abcdef_{row}" for shard in (0, 1) for row in (0, 1)
    ]
    with data.unlocked():
        data.classes = ("normal", "metastasis")
    classes, named = read(data)
    assert classes == ("normal", "metastasis") and named == found


@pytest.mark.parametrize(
    "pattern",
    [
        "{split}-{shard:05d}-of-00002.parquet",
        "{split}{shard}.parquet",
        "default/{split}/000{shard}.parquet",
        "data/{split}/{split}-{shard}.parquet",
    ],
)
def test_splits_are_found_by_the_names_of_files_or_folders(pattern, tmp_path, make_data):
    data = make_data("parquet", write_splits(tmp_path, pattern))
    assert numbers_of(read(data)[1]) == NUMBERS
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        if "valid" in path.name:
            path.rename(path.with_name(path.name.replace("valid", "Validation")))
    assert numbers_of(read(data)[1]) == NUMBERS
    assert numbers_of(read(make_data("parquet", tmp_path, valid_size=3, train_size=5))[1]) == {
        "test": NUMBERS["test"], "valid": [8, 9, 10], "train": [0, 1, 2, 3, 4],
    }  # fmt: skip


def test_names_of_classes_keep_their_own_order(tmp_path, make_data):
    folder = write_splits(tmp_path, names=["tumour", "normal", "absent"])
    classes, found = read(make_data("parquet", folder))
    assert classes == ("tumour", "normal")
    assert [row[1] for row in found["train"]] == [0, 1] * 4
    classes, found = read(make_data("parquet", folder, classes=("normal", "tumour")))
    assert classes == ("normal", "tumour")
    assert [row[1] for row in found["train"]] == [1, 0] * 4


def test_labels_may_be_text_and_images_bytes_alone(tmp_path, make_data):
    labels = ["tumour 🦠", "normal"] * 8
    table = pa.table({"image": [picture(number) for number in range(16)], "label": labels})
    table = table.set_column(1, "label", table["label"].dictionary_encode())
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=5)
    classes, found = read(make_data("parquet", tmp_path / "all.parquet", split_ratio=(2, 1, 1)))
    assert classes == ("normal", "tumour 🦠")
    rows = [row for rows in found.values() for row in rows]
    assert sorted(row[0] for row in rows) == list(range(16))
    assert all(label == 1 - number % 2 for number, label, *_ in rows)
    assert all(name == f"all_{number}" for number, _, name, _ in rows)
    assert {split: len(rows) for split, rows in found.items()} == {
        "test": 4,
        "valid": 4,
        "train": 8,
    }


@pytest.mark.parametrize("fields", [{}, {"group": "patient"}])
@pytest.mark.parametrize("kind", [pa.int32(), pa.string(), pa.large_string()])
def test_files_without_splits_are_divided_by_groups(kind, fields, tmp_path, make_data):
    column = fields.get("group", "group")
    for shard in range(4):
        numbers = range(4 * shard, 4 * shard + 4)
        # A patient's patches lie in two files.
        groups = pa.array([str(number % 8) for number in numbers]).cast(kind)
        paths = [f"{number}.png" for number in numbers]
        table = table_of(numbers, paths=paths, **{column: groups})
        pq.write_table(table, tmp_path / f"train-0000{shard}-of-00004.parquet")
    found = read(make_data("parquet", tmp_path, split_ratio=(0.5, 0.25, 0.25), **fields))[1]
    assert sorted(row[0] for rows in found.values() for row in rows) == list(range(16))
    sides = {split: {row[3] for row in rows} for split, rows in found.items()}
    assert sum(map(len, sides.values())) == 8
    for rows in found.values():
        assert all(group == str(number % 8) for number, _, _, group in rows)
        assert all(name == f"{number}.png" for number, _, name, _ in rows)
        assert rows == sorted(rows)


def test_paths_that_repeat_are_no_ids(tmp_path, make_data):
    for split, names in (("train", "aba"), ("valid", "abc"), ("test", ["", "a", "b"])):
        pq.write_table(table_of(range(3), paths=list(names)), tmp_path / f"{split}.parquet")
    ids = {
        split: [row[2] for row in rows]
        for split, rows in read(make_data("parquet", tmp_path))[1].items()
    }
    assert ids == {
        "train": ["train_0", "train_1", "train_2"], "valid": ["a", "b", "c"],
        "test": ["test_0", "test_1", "test_2"],
    }  # fmt: skip


# ---- mistakes -----------------------------------------------------------------------------------


def write(change):
    return lambda folder: pq.write_table(change(table_of(range(4))), folder / "train.parquet")


def column(name, values, kind=None):
    return write(lambda table: table.set_column(
        table.schema.names.index(name), name, pa.array(values, kind)))  # fmt: skip


def named(*names):
    return lambda folder: pq.write_table(table_of(range(4), names=names), folder / "train.parquet")


def metadata(text):
    return write(lambda table: table.replace_schema_metadata({"huggingface": text}))


NO_BYTES = [{"bytes": None, "path": "0.png"}] * 4
MISTAKES = {
    "no image": (write(lambda t: t.drop(["image"])), ": has no column image; its columns are "),
    "no label": (write(lambda t: t.drop(["label"])), ": has no column label; its columns are "),
    "two": (write(lambda t: t.append_column("label", t["label"])), ": has 2 columns label; its"),
    "image of numbers": (column("image", range(4)), ": its column image is int64; it must hold"),
    "image of lists": (column("image", [[b"x"]] * 4), ": its column image is list<"),
    "bytes of lists": (column("image", [{"bytes": [1]}] * 4), ": its column image is struct<"),
    "nested": (column("image", [{"bytes": {"bytes": b"x"}}] * 4), ": its column image is struct<"),
    "label of floats": (column("label", [0.5] * 4), ": its column label is double; it must be who"),
    "label of lists": (column("label", [[0]] * 4), ": its column label is list<"),
    "group of lists": (
        write(lambda t: t.append_column("group", pa.array([[0]] * 4))), ": its column group is li",
    ),
    "empty group": (
        write(lambda t: t.append_column("group", pa.array(["P", "", "P", "P"]))),
        "train.parquet row 1: its group is empty, or has more than 1024 characters",
    ),
    "null label": (column("label", [0, 1, None, 0]), "train.parquet row 2: has no label"),
    "empty label": (column("label", ["a", "", "b", "a"]), "train.parquet row 1: has no label"),
    "label -1": (
        lambda folder: pq.write_table(
            table_of(range(4), [0, 1, 0, -1], names=["a", "b"]), folder / "train.parquet"
        ),
        "train.parquet row 3: label -1, but there are names of 2 classes",
    ),
    "no bytes": (column("image", NO_BYTES, IMAGE), "train.parquet row 0: its image has 0 bytes"),
    "no picture": (column("image", [b"x" * 99] * 4), "train.parquet row 0: cannot be read as a p"),
    "a class only in test": (column("label", [1] * 4), ": train has no patch of class '0', which "),
    "names": (metadata('{"info": {"features": {"label": {"names": [1]}}}}'), "are not texts)"),
    "JSON": (metadata("[" * 100_000), "train.parquet: cannot be read ("),
    "only test": (lambda f: (f / "train.parquet").rename(f / "test2.parquet"), ": has no patch of"),
    "no split": (lambda f: (f / "valid.parquet").rename(f / "x.parquet"), "x.parquet: its name sa"),
    "none": (lambda f: [p.unlink() for p in f.iterdir()], ": holds no .parquet file; set"),
    "part": (
        lambda f: (f / "train.parquet").rename(f / "train-00001-of-00003-x.parquet"),
        "train-00000-of-00003: is missing, but others of its 3 files are there; fetch",
    ),
    "two sets": (
        lambda f: [(f / "x").mkdir(), (f / "valid.parquet").rename(f / "x/valid.parquet")],
        ": holds several data sets, in ",
    ),
    "two names": (
        lambda f: [(f / "train").mkdir(), (f / "test.parquet").rename(f / "train/train.parquet")],
        "train.parquet: has the name of ",
    ),
    "empty file": (lambda f: (f / "train.parquet").write_bytes(b""), "train.parquet: cannot be re"),
    "text": (lambda f: (f / "train.parquet").write_bytes(b"x" * 999), "train.parquet: "),
    "rows": (
        lambda f: pq.write_table(
            pa.table({"image": [b"x"] * 200_000, "label": [0, 1] * 100_000}), f / "train.parquet"
        ),
        "train.parquet: declares 200000 rows, which it cannot hold",
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Returns a folder with one good file for each split."""
    for split in COUNTS:
        pq.write_table(table_of(range(4)), tmp_path / f"{split}.parquet")
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake, folder, make_data):
    assert read(make_data("parquet", folder))
    damage, message = MISTAKES[mistake]
    damage(folder)
    expect_error(make_data("parquet", folder), str(folder), message)


def test_a_missing_place_or_column_is_named(folder, make_data):
    expect_error(
        make_data("parquet", folder / "x"), f"{folder / 'x'}: no such file; set config.data"
    )
    expect_error(
        make_data("parquet", folder, group="patient"), "test.parquet: has no column patient"
    )
    expect_error(
        make_data("parquet", folder, classes=("a",) * 1 + ("b", "c")), "config.data.classes has 'c'"
    )
    pq.write_table(table_of(range(4), [0, 1, 5, 0]), folder / "train.parquet")
    expect_error(
        make_data("parquet", folder, classes=("a", "b")),
        "has the label 5, but config.data.classes names 2 classes, 0 .. 1",
    )


def test_without_pyarrow_the_error_says_how_to_install_it(folder, make_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    expect_error(make_data("parquet", folder), 'parquet needs pyarrow: pip install "bef_jax[hub]"')


def test_a_special_file_is_refused(folder, special, printed_by):
    code, expected = [], []
    for kind in ("a FIFO", "a socket", "a device"):
        for path in (folder / f"{kind}.parquet", folder / kind / "train.parquet"):
            path.parent.mkdir(exist_ok=True)
            special(kind, path)
            where = path if path.parent == folder else path.parent
            code.append(f"sources.open_source(data_of('parquet', {str(where)!r}))")
            expected.append(f"{path}: is {kind}; name a regular file")
    assert printed_by(*code) == expected


@pytest.mark.parametrize("seed", range(3))
def test_any_damage_gives_one_line(seed, tmp_path, make_data):
    """Each of the files has a few random bytes, or is cut."""
    rng = np.random.default_rng(seed)
    path = tmp_path / "all.parquet"
    paths = [f"{number}.png" for number in range(16)]
    pq.write_table(table_of(range(16), paths=paths, names=["a", "b"]), path, row_group_size=5)
    whole = path.read_bytes()
    for _ in range(40):
        damaged = bytearray(whole)
        # The footer is short, and decides more.
        for place in [*rng.integers(len(whole), size=3), *(-rng.integers(1, 1500, size=2))]:
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(4, len(whole))] if rng.random() < 0.2 else damaged)
        try:
            read(make_data("parquet", path))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error


# ---- sizes --------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_file(tmp_path, make_data):
    """The file is a single row group, and none of its pictures shrinks."""
    file = io.BytesIO()
    Image.new("RGB", (96, 96)).save(file, "bmp")
    head, rng = file.getvalue()[:54], np.random.default_rng(0)
    images = [head + rng.bytes(96 * 96 * 3) for _ in range(8000)]
    pq.write_table(pa.table({"image": images, "label": [0, 1] * 4000}), tmp_path / "x.parquet")
    del images
    size = (tmp_path / "x.parquet").stat().st_size

    def read_all():
        contents = sources.open_source(make_data("parquet", tmp_path))
        assert sum(len(chunk.labels) for _, chunk in contents.chunks) == 8000

    assert growth_of(read_all) < 0.8 * size  # Arrow's dictionaries have 1,024 of the pictures


@pytest.mark.parametrize("kind", ["a page", "a dictionary"])
def test_a_page_that_unpacks_to_gigabytes_is_refused(kind, folder, printed_by):
    images = [bytes(1 << 20)] * 400 if kind == "a page" else [bytes(300 << 20), picture(0)]
    images += [picture(number) for number in range(10)]
    path = folder / "train.parquet"
    pq.write_table(
        pa.table({"image": images, "label": [0, 1] * (len(images) // 2)}),
        path,
        compression="zstd",
        use_dictionary=kind == "a dictionary",
        data_page_size=2 << 30,
    )
    assert path.stat().st_size < 3 << 20
    (line,) = printed_by(f"list(sources.open_source(data_of('parquet', '{folder}')).chunks)")
    assert line.startswith(f"{path}: a page of image has ") and "smaller pages" in line


@pytest.mark.slow
def test_a_large_picture_in_all_rows_is_not_in_memory_for_each(tmp_path, make_data):
    file = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(file, "bmp")  # 27 MB
    images = pa.DictionaryArray.from_arrays(
        pa.array([0] * 40, pa.int8()), pa.array([file.getvalue()])
    )
    table = pa.table({"image": images, "label": [0, 1] * 20})
    pq.write_table(table, tmp_path / "x.parquet", store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 32 << 20
    data = make_data("parquet", tmp_path, resize="side", split_ratio=(8, 1, 1))

    def read_all():
        assert sum(len(chunk.labels) for _, chunk in sources.open_source(data).chunks) == 40

    assert growth_of(read_all) < 25 * 27e6


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_largest_page_is_found(compression, version, tmp_path):
    """A column without a dictionary has its values and their lengths in its pages."""
    path = tmp_path / "x.parquet"
    values = [bytes([number]) * 1000 for number in range(100)] + [b"x" * 50_000]
    pq.write_table(
        pa.table({"x": values}), path, use_dictionary=False, data_page_size=5000,
        write_batch_size=1, compression=compression, data_page_version=version,
    )  # fmt: skip
    known = pq.ParquetFile(path).metadata.row_group(0).column(0)
    (group,) = read_footer(path)
    chunk = group.chunks["x"]
    assert group.count == 101 and list(group.chunks) == ["x"]
    assert chunk == (known.data_page_offset, known.total_compressed_size, True)
    with open(path, "rb") as file:
        assert 50_000 < largest_page(file, chunk) < 60_000
        for wrong in (
            chunk._replace(size=path.stat().st_size),
            chunk._replace(start=chunk.start + 1),
        ):
            with pytest.raises(ValueError, match="its footer, or the header of a page, is damaged"):
                largest_page(file, wrong)


# ---- hub ----------------------------------------------------------------------------------------

NAME = "hf:1aurent/PatchCamelyon"


@pytest.fixture
def server(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: '.[hub]'")
    folder = write_splits(tmp_path / "made")
    with serve() as running:
        running.files["datasets/1aurent/PatchCamelyon"] = {
            "README.md": b"cc0",
            **{
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in folder.rglob("*.parquet")
            },
        }
        with environment(monkeypatch, HF_ENDPOINT=running.endpoint, HF_HOME=str(tmp_path / "hf")):
            # The library would sleep for seconds between two tries.
            monkeypatch.setattr(time, "sleep", lambda seconds: None)
            yield running


def test_a_data_set_is_fetched_once(server, make_data, monkeypatch):
    data = make_data("parquet", NAME)
    assert numbers_of(read(data)[1]) == NUMBERS
    assert not any("README" in path for _, path, _ in server.requests)
    server.requests.clear()
    assert numbers_of(read(data)[1]) == NUMBERS
    assert not any(method == "GET" and "/resolve/" in path for method, path, _ in server.requests)
    with environment(monkeypatch, HF_HUB_OFFLINE="1"):
        assert numbers_of(read(data)[1]) == NUMBERS
        expect_error(make_data("parquet", "hf:a/other"), "hf:a/other: incomplete in ")
    assert source.home(data) == Path("data/1aurent--PatchCamelyon")
    assert source.identity(data)["dir"] == NAME


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:a/nowhere", "no such repository, or a private one: set HF_TOKEN"),
        (f"{NAME}@v2", "has no revision v2; give another after @"),
        ("hf:a/gated", "is gated: accept its terms on its page, and set HF_TOKEN"),
        ("hf:a/down", "answers 503: try again later"),
        ("hf:a/b/c", "write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"),
        ("hf:", "write hf:OWNER/NAME, or hf:OWNER/NAME@REVISION"),
    ],
)
def test_what_the_hub_refuses(name, message, server, make_data):
    server.refused["datasets/a/gated"] = (403, "GatedRepo")
    server.refused["datasets/a/down"] = (503, "")
    expect_error(make_data("parquet", name), name, message)


def test_a_data_set_without_parquet_files_is_named(server, make_data):
    server.files["datasets/a/empty"] = {"README.md": b"empty"}
    expect_error(make_data("parquet", "hf:a/empty"), "hf:a/empty: holds no .parquet file")


def test_a_download_that_breaks_off_is_not_used(server, make_data):
    server.files["datasets/a/cut"] = {"train.parquet": bytes(50_000)}
    server.shorter = 5
    expect_error(make_data("parquet", "hf:a/cut"), "hf:a/cut: ", "no part of it is used")


def test_a_damaged_cache_is_found(server, make_data, tmp_path):
    content = bytes(50_000)
    server.files["datasets/a/large"] = {"train.parquet": content}
    expect_error(make_data("parquet", "hf:a/large"), "train.parquet: cannot be read")
    (path,) = (tmp_path / "hf").rglob("train.parquet")
    path.resolve().write_bytes(content[:-1] + b"x")
    expect_error(make_data("parquet", "hf:a/large"), "is damaged: delete it, so that it is fetched")


def test_without_the_library_the_error_says_how_to_install_it(make_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    expect_error(make_data("parquet", NAME), "needs huggingface_hub: pip install")
