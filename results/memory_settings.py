"""Measures what the memory settings gain: trains B2 with them, started in two ways, and without.

    python results/memory_settings.py ROUNDS FOLDER

Run it in a checkout whose environment is active. A round takes about five minutes on two cores. The
runs take turns, after one that fills the compilation cache. FOLDER gets the patches, the compiled
programs and the runs. It prints the images/s and seconds of CPU time of each run, then medians and
ratios.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

FIELDS = (
    "model.total_stride=32", "batch_size=32", "steps=100", "eval.every_epochs=99",
    "data.source=synthetic", "data.train_size=1000", "data.valid_size=32", "data.test_size=32",
)  # fmt: skip
STARTS = {
    "python -m": [sys.executable, "-m", "bef_jax.main"],
    "local.sh": ["bash", "launch/local.sh", "train"],
    "off": [sys.executable, "-m", "bef_jax.main", "--nomemory_settings"],
}


def train(start: str, folder: Path) -> float:
    """Trains once, and returns the images/s without compilation and evaluation."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    fields = (*FIELDS, f"data.dir={folder / 'data'}", f"compile_cache={folder / 'cache'}")
    command = [*STARTS[start], "--config=configs/b2.py", f"--workdir={folder / 'run'}"]
    command += [f"--config.{field}" for field in fields]
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["BEF_VENV"] = sys.prefix
    before = os.times()
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    after = os.times()
    user = after.children_user - before.children_user
    system = after.children_system - before.children_system
    images_per_second = json.loads(result.stdout)["images_per_second"]
    cpu = f"user {user:.0f} s, system {system:.0f} s"
    print(f"{start:9}  {images_per_second:6.1f} images/s  {cpu}", flush=True)
    return images_per_second


def main() -> None:
    """Runs the rounds, and prints the results."""
    rounds, folder = int(sys.argv[1]), Path(sys.argv[2]).resolve()
    train("python -m", folder)
    rates = [{start: train(start, folder) for start in STARTS} for _ in range(rounds)]
    for start in STARTS:
        print(f"{start}: median {median(rate[start] for rate in rates):.1f} images/s")
    for a, b in (("python -m", "off"), ("local.sh", "off"), ("local.sh", "python -m")):
        ratios = sorted(rate[a] / rate[b] for rate in rates)
        print(f"{a} / {b}: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
