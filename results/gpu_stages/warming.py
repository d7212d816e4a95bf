"""The stage `warm`: compiles what later stages time, because it would take most of their time."""

import argparse
import subprocess
import sys
import time

from gpu_check import STAGES, command_of

from gpu_stages import emit


def warm(options: argparse.Namespace) -> None:
    """Compiles what the stages named in `options.subject` time, all side by side."""
    start, running, record = time.monotonic(), {}, {"warm": {}}
    by_name = {stage.name: stage for stage in STAGES}
    flags = [f"--out={options.out}", "--only_compile", *["--tiny"] * options.tiny]
    for name in options.subject.split(","):
        command = command_of(by_name[name], *flags)
        running[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while running:
        time.sleep(0.2)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            rc = running.pop(name).returncode
            record["warm"][name] = {"rc": rc, "seconds": round(time.monotonic() - start, 1)}
            emit(record)
    if any(done["rc"] for done in record["warm"].values()):
        sys.exit("a program could not be compiled")
