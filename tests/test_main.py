"""Runs the command: a mistake gives one line and status 2, before anything is compiled."""

import functools
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import bef_jax
from bef_jax import train
from bef_jax.configs import default
from bef_jax.data import store
from bef_jax.errors import UserError
from bef_jax.models import weights
from bef_jax.scoring import trained
from bef_jax.training import pretrained


def run_main(*flags, cwd=None):
    command = [sys.executable, "-m", "bef_jax.main", *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def write_npz(folder, images, labels):
    for split in ("train", "valid"):
        np.savez(folder / f"{split}.npz", images=images, labels=labels)


def refused(*flags):
    """Runs main, checks how it ends, and returns the line that the user reads."""
    result = run_main(*flags)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.returncode, result.stdout, len(lines)) == (2, "", 1), result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--config is missing", "--config=b2"]),
        (["--config.batch_size=3"], ["--config is missing"]),
        (["--mode=eval", "--config.eval.tt=8"], ["did you mean --config.eval.tta?"]),
        (["--mode=eval", "--config.eval.tta=many"], ["eval.tta", "many"]),
        (["--config=b22"], ["did you mean b2?"]),
        (["--config=configs/nowhere.py"], ["nowhere.py", "No such file"]),
        (["--config=configs/b0.py", "--config.batchsize=3"], ["did you mean --config.batch_size?"]),
        (["--config=b0:batchsize=3"], ["batchsize=3", "did you mean batch_size?"]),
        (["--config=configs/b0.py", "--config.batch_size=many"], ["batch_size", "many"]),
        (["--config=configs/b0.py:batch_size=many"], ["batch_size", "many"]),
        (["--config=configs/b0.py", "--config.model.total_stride=4"], ["total_stride=4", "32, 16"]),
        (["--config=configs/b0.py", "--mode=fly"], ["--mode=fly", "train"]),
        (["--config=b0", "--mode=trian"], ["did you mean train?"]),
        (["train", "--config=b0"], ["did you mean --mode=train?"]),
        (["--config=configs/b0.py", "--mode=benchmark", "--compare=torch"], ["torch", "lax"]),
        (["--config=configs/b0.py", "--no_such_flag"], ["no_such_flag"]),
        (["--config=b0", "--work_dir=run"], ["did you mean --workdir?"]),
        (["--config=configs/b0.py", "--config.data.dir=nowhere"], ["nowhere"]),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(flags, words, tmp_path):
    line = refused(*flags, f"--workdir={tmp_path / 'run'}")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("mode", ["train", "prepare", "import_weights", "ablate", "plan"])
def test_a_workdir_that_cannot_be_written_is_found_before_the_work(mode, tmp_path):
    (tmp_path / "file").write_text("content")
    flags = ["--config=quickstart", f"--mode={mode}", f"--config.data.dir={tmp_path / 'data'}"]
    line = refused(*flags, f"--workdir={tmp_path / 'file'}")
    assert "is not a folder; give another --workdir" in line
    (tmp_path / "run" / f"{mode}_summary.json").mkdir(parents=True)
    line = refused(*flags, f"--workdir={tmp_path / 'run'}")
    assert f"{mode}_summary.json: is in the way of an output file" in line
    assert not (tmp_path / "data").exists()


IMPOSSIBLE = ["~no-such-user/x", "x" * 300, "loop"]


@pytest.mark.parametrize("given", IMPOSSIBLE)
def test_impossible_paths_are_refused_by_every_function(given, tmp_path, monkeypatch):
    """Calls every function that takes a path from a user; the next test checks the flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    data = {source: default.get_config().data for source in ("npz", "rpcam", "pcam_hdf5")}
    for source, each in data.items():
        each.update({"source": source, "dir": given})
    stored = default.get_config().data
    stored.update({"source": "synthetic", "store": given})
    takers = [
        lambda: trained.find(given),
        lambda: pretrained.find(given),
        lambda: weights.resolve(given),
        lambda: bef_jax.load(given),
        lambda: train.train_and_evaluate(default.get_config(), given),
        *(functools.partial(store.prepare, each) for each in [*data.values(), stored]),
    ]
    for take in takers:
        with pytest.raises(UserError, match="cannot be a path"):
            take()
    assert os.listdir(tmp_path) == ["loop"]


@pytest.mark.parametrize("flag", ["--workdir", "--checkpoint", "--weights"])
def test_impossible_paths_in_flags_are_refused(flag, tmp_path):
    mode = {"--workdir": "train", "--weights": "import_weights"}.get(flag, "predict")
    (tmp_path / "loop").symlink_to("loop")
    line = refused("--config=quickstart", f"--mode={mode}", f"--workdir={tmp_path}/run",
                   f"{flag}={tmp_path}/loop")  # fmt: skip
    assert "cannot be a path" in line


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (
            np.zeros((4, 32, 32, 3), np.uint8),
            [0, 1, 0, 1],
            ["valid.npz", "must be uint8 [N, 96, 96, 3], not uint8 [4, 32, 32, 3]"],
        ),
        (np.zeros((4, 96, 96, 3), np.uint8), [0, 1, 2, 1], ["valid.npz", "label"]),
        (np.zeros((0, 96, 96, 3), np.uint8), [], ["holds no patch"]),
    ],
)
def test_wrong_data_is_named_in_one_line(images, labels, words, tmp_path):
    write_npz(tmp_path, images, np.array(labels, np.uint8))
    flags = ["--config=configs/b0.py", "--config.data.source=npz", f"--config.data.dir={tmp_path}"]
    line = refused(*flags, f"--workdir={tmp_path / 'run'}")
    assert all(word in line for word in words), line
    assert not list(tmp_path.glob("store*"))


def test_a_damaged_store_is_named(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 96, 96, 3), np.uint8)
    write_npz(tmp_path, images, np.array([0, 1, 0, 1], np.uint8))
    flags = ["--config=configs/b0.py", "--config.data.source=npz", f"--config.data.dir={tmp_path}",
             "--config.data.rectify=False", f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    assert run_main(*flags, "--mode=prepare").returncode == 0
    (tmp_path / "store_npz" / "train" / "images.npy").write_bytes(b"short")
    assert "train/images.npy" in refused(*flags)


def test_a_damaged_picture_is_reported_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # because an unused GPU gets a line, too
    file = tmp_path / "one.tif"
    Image.new("RGB", (96, 96)).save(file)
    # Give the height an unknown type: Pillow gives up; tifffile logs that it goes on without it.
    height, nonsense = struct.pack("<HH", 257, 4), struct.pack("<HH", 257, 0x0301)
    assert height in file.read_bytes()
    names = [f"patch{i}" for i in range(40)]  # so many that no split is empty
    (tmp_path / "train").mkdir()
    for name in names:
        damaged = file.read_bytes().replace(height, nonsense)
        (tmp_path / "train" / f"{name}.tif").write_bytes(damaged)
    rows = ["id,label", *(f"{name},0" for name in names)]
    (tmp_path / "train_labels.csv").write_text("\n".join(rows))
    flags = ["--config=b0", "--mode=prepare", "--config.data.source=rpcam"]
    result = run_main(*flags, f"--config.data.dir={tmp_path}")
    # The first line names the device, and an empty one ends the progress bar.
    (line,) = filter(None, result.stderr.splitlines()[1:])
    assert result.returncode == 2
    assert line.startswith(f"error: {tmp_path}/train/patch") and ".tif: 96x0 pixels" in line


@pytest.mark.parametrize("flags", [["--help"], ["--version"], ["--mode=predict", "--help"]])
def test_help_needs_no_jax(flags):
    code = (
        "import sys, atexit; from bef_jax.main import run; "
        f"sys.argv[1:] = {flags}; atexit.register(lambda: print('jax' in sys.modules)); run()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "False"


def test_help_ends_quietly_when_its_reader_closes_the_pipe():
    command = f"'{sys.executable}' -m bef_jax.main --mode=train --help | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("", "")


def test_help_with_a_mode_shows_what_that_mode_reads():
    result = run_main("--help", "--mode", "predict")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--input=" in result.stdout and "--config.predict.stride=" in result.stdout
    assert "--topology" not in result.stdout and "--config.optim" not in result.stdout


@pytest.mark.parametrize("spelling", [["--config={}"], ["--config", "{}"], ["-config={}"]])
def test_a_packaged_config_is_known_by_its_name_in_any_folder(spelling, tmp_path):
    config = "quickstart:data.train_size=5,data.valid_size=4"
    flags = [flag.format(config) for flag in spelling] + ["--config.data.test_size=3"]
    result = run_main(*flags, "--mode=prepare", cwd=tmp_path)
    assert json.loads(result.stdout)["counts"] == {"train": 5, "valid": 4, "test": 3}


def test_summary_is_the_only_line_on_stdout_and_is_written(tmp_path):
    flags = ["--config=configs/quickstart.py", "--mode=prepare", "--config.data.train_size=5",
             "--config.data.valid_size=4", "--config.data.test_size=3",
             f"--config.data.dir={tmp_path}", f"--workdir={tmp_path / 'run'}"]  # fmt: skip
    result = run_main(*flags)
    summary = json.loads(result.stdout)
    assert summary["counts"] == {"train": 5, "valid": 4, "test": 3}
    assert json.loads((tmp_path / "run" / "prepare_summary.json").read_text()) == summary


def test_workdir_defaults_to_the_name_of_the_config(tmp_path):
    config = os.path.abspath("configs/quickstart.py")
    flags = ["--mode=prepare", "--config.data.train_size=5", "--config.data.valid_size=4",
             "--config.data.test_size=3"]  # fmt: skip
    run_main(f"--config={config}", *flags, cwd=tmp_path)
    assert (tmp_path / "runs" / "quickstart" / "prepare_summary.json").exists()


# Importing one of these would add seconds to every start, and some are optional extras.
@pytest.mark.parametrize("package", ["tensorflow", "torch", "huggingface_hub", "safetensors"])
def test_training_imports_no_other_framework(package):
    code = f"import sys, bef_jax.train; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.smoke
def test_windows_gets_one_line():
    code = "import runpy, sys; sys.platform = 'win32'; runpy.run_module('bef_jax.main')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert line.startswith("error: ") and "WSL" in line
