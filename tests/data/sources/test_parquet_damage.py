"""Parquet files with mistakes, damage or huge sizes: one line each, and little memory."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from bef_jax.data import sources
from bef_jax.data.sources.parquet.footer import largest_page, read_footer
from bef_jax.errors import UserError
from tests.data.sources.conftest import expect_error, read_all
from tests.data.sources.parquet_files import COUNTS, IMAGE, pa, picture, pq, table_of
from tests.memory import growth_of


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
    assert read_all(make_data("parquet", folder))
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
            read_all(make_data("parquet", path))
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error


# ---- sizes --------------------------------------------------------------------------------------


WRITE_LARGE = """
import io, sys
import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
from PIL import Image

file, rng = io.BytesIO(), np.random.default_rng(0)
Image.new("RGB", (96, 96)).save(file, "bmp")
images = [file.getvalue()[:54] + rng.bytes(96 * 96 * 3) for _ in range(16_000)]
pq.write_table(pa.table({"image": images, "label": [0, 1] * 8000}), sys.argv[1])
"""


def test_memory_does_not_grow_with_the_file(folder, make_data):
    """The file is a single row group, and none of its pictures shrinks."""
    read_all(make_data("parquet", folder))  # imports the libraries
    path = folder / "large" / "x.parquet"
    path.parent.mkdir()
    # Another process writes it, because this one would keep the memory that writing takes.
    subprocess.run([sys.executable, "-c", WRITE_LARGE, path], check=True)

    def read_file():
        contents = sources.open_source(make_data("parquet", path))
        assert sum(len(chunk.labels) for _, chunk in contents.chunks) == 16_000

    assert path.stat().st_size > 440e6
    assert (
        growth_of(read_file) < 300e6
    )  # 200e6 as for a quarter of the file; Arrow keeps 1,024 rows


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

    def read_file():
        assert sum(len(chunk.labels) for _, chunk in sources.open_source(data).chunks) == 40

    assert growth_of(read_file) < 25 * 27e6


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
