"""Measures the start: `import bef_jax`, and from a command to the probability of one picture.

    python results/cold_start.py RUN PICTURE [ROUNDS]

Run it in the environment of bef_jax. RUN is the folder of a trained run, and PICTURE one patch. A
first round fills the compilation cache and is not counted. Then the starts take turns, five times
by default. Each line has the medians of wall time and of user and system time.
"""

import os
import subprocess
import sys
import tempfile
import time
from statistics import median


def starts(run: str, picture: str, folder: str) -> dict[str, list[str]]:
    """Returns the commands that are measured, by name; they write to `folder`."""
    program = [sys.executable, "-m", "bef_jax.main"]
    in_python = f"import bef_jax; bef_jax.load({run!r}).predict({picture!r})"
    predict = ["--mode=predict", f"--checkpoint={run}", f"--input={picture}"]
    return {
        "import bef_jax": [sys.executable, "-c", "import bef_jax"],
        "--help": [*program, "--help"],
        "--mode=predict": [*program, *predict, f"--workdir={folder}"],
        "bef_jax.load(RUN).predict(PICTURE)": [sys.executable, "-c", in_python],
    }


def seconds(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns its wall time, and its user and system time together."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - start, os.times()
    user, system = after.children_user, after.children_system
    return wall, user + system - before.children_user - before.children_system


def main() -> None:
    """Prints the medians."""
    run, picture, *rest = sys.argv[1:]
    rounds = int(rest[0]) if rest else 5
    with tempfile.TemporaryDirectory() as folder:
        commands = starts(run, picture, folder)
        for command in commands.values():
            seconds(command)
        found = [{name: seconds(each) for name, each in commands.items()} for _ in range(rounds)]
    for name in commands:
        wall, cpu = (median(times) for times in zip(*(each[name] for each in found), strict=True))
        print(f"{name}: {wall:.2f} s, of CPU {cpu:.2f} s")


if __name__ == "__main__":
    main()
