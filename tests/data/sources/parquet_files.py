"""Writes small Parquet files in the layout of Hugging Face's image data sets."""

import io
import json

import pytest
from PIL import Image

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


NUMBERS = {"test": [12, 13, 14, 15], "valid": [8, 9, 10, 11], "train": list(range(8))}


def numbers_of(found):
    return {split: [row[0] for row in rows] for split, rows in found.items()}
