"""What predict writes, for pictures with any names and for two runs at once."""

import csv
import os
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from bef_jax import predict
from bef_jax.configs import default
from bef_jax.data import inputs
from bef_jax.data.patch import tiling
from bef_jax.errors import UserError
from bef_jax.predict import Prediction
from bef_jax.runtime import lock

_NAMES = [
    "=cmd|' calc'!A0", "+1", "-2+3", "@sum(A1)", "\ttab", "\rreturn", "two\nlines",
    "\x1b[31mred", "\u202egnp.exe", "\udc80\udcff", "\u00e4", "'quoted'", 'a,"b', "$\\frac{1$",
    "x" * 247, "-" + "y" * 240, " ", "a.png", "a.tif", "%s %n", "{0}", "\x7f", "\u2028",
]  # fmt: skip


def names(folder: Path, rng: random.Random) -> None:
    """Writes pictures with badly chosen names, a few of them larger than a patch."""
    for _ in range(rng.choice([1, 3, 6])):
        wide = rng.random() < 0.03
        pixels = np.zeros((96, 130 if wide else 96, 3), np.uint8)
        name = rng.choice(_NAMES) + rng.choice([".png", ".tif", ".jpg"])
        below = folder / rng.choice([".", ".", "=below", "b"])
        below.mkdir(exist_ok=True)
        file = below / name
        Image.fromarray(pixels).save(below / f"plain{file.suffix}")
        os.replace(below / f"plain{file.suffix}", file)


def write_names(folder: Path) -> None:
    """Gives every patch the probability 0.5, and checks what predict writes."""
    config = default.get_config()
    inputs.check(folder, None, config.data.patch_size, lenient=True)
    unreadable: dict[str, str] = {}
    patches = inputs.read(folder, None, tiling(config), unreadable=unreadable)
    predictions = (Prediction(patch._replace(pixels=None), 0.5) for patch in patches)
    with tempfile.TemporaryDirectory() as name:
        found = predict._write(Path(name), predictions, config)
        if not found["n"]:
            raise UserError(predict._none_readable(unreadable))
        lines = (Path(name) / "predictions.csv").read_text(encoding="utf-8").splitlines()
        assert len(list((Path(name) / "heatmaps").rglob("*.png"))) == len(found["heatmaps"])
    rows = list(csv.reader(lines))
    assert len(rows) == len(lines) == found["n"] + 1, "a row of more than one line"
    for cell in (row[0] for row in rows):
        assert cell[0] not in "=+-@", f"a spreadsheet would run {cell!r}"
        assert cell.isprintable(), f"a terminal would obey {cell!r}"


def rows_of_two(folder: Path, rng: random.Random) -> None:
    """Writes a file whose length says how long two runs wait between their rows."""
    (folder / "delay").write_bytes(bytes(rng.randrange(100)))


def write_two(folder: Path) -> None:
    """Runs two at once: one may be refused or come later, and the file is that of one of them."""
    file = folder / "delay"
    delay = file.stat().st_size / 1e4 if file.is_file() else 0.0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        workdir = Path(name)
        errors = list(pool.map(lambda who: _write_rows(workdir, who, delay), "ab"))
        assert None in errors, errors
        rows = set((workdir / "predictions.csv").read_text().splitlines())
        assert len(rows) == 1, f"mixed: {rows}"
        assert not [file for file in os.listdir(workdir) if "tmp" in file]


def _write_rows(workdir: Path, who: str, delay: float) -> UserError | None:
    try:
        with lock.held(workdir, ".predict.lock"), predict._stage(workdir) as stage:
            with open(stage / "predictions.csv", "w") as out:
                out.writelines(_rows(who, delay))
            predict._publish(stage, workdir)
    except UserError as error:
        return error
    return None


def _rows(who: str, delay: float) -> Iterator[str]:
    for _ in range(10):
        yield f"{who}\n"
        time.sleep(min(delay, 0.1) / 10)
