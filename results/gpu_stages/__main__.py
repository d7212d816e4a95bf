"""Runs one stage. gpu_check.py starts it as a process.

    PYTHONPATH=.:results python -m gpu_stages STAGE [ARGUMENTS] --out=OUT [--tiny]

OUT gets what is too long for a record. What needs torch and timm is skipped where those are
missing.
"""

import argparse
import importlib
from pathlib import Path

from gpu_stages import emit

# The module of each stage. Only that one is imported, so that what it lacks stops no other stage.
MODULES = {
    "env": "machine", "warm": "warming", "bench": "speed", "timm": "peer", "numeric": "losses",
    "curve": "losses", "micro": "depthwise",
}  # fmt: skip
PEERS = ("timm", "torch")  # what may be missing


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stage", choices=MODULES)
    parser.add_argument("subject", nargs="?", help="a network; warm: names of stages")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--name", help="of the stage, for its files")
    parser.add_argument("--stride", type=int, default=32, help="total stride")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--calls", type=int, default=1, help="steps per call")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--form", default="auto", help="of the depthwise convolution")
    for flag in ("tiny", "profile", "compile", "only_compile"):
        parser.add_argument(f"--{flag}", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Runs one stage."""
    options = parse_arguments()
    try:
        module = importlib.import_module(f"gpu_stages.{MODULES[options.stage]}")
        getattr(module, options.stage)(options)
    except ModuleNotFoundError as error:
        if error.name not in PEERS:
            raise
        emit({"skipped": f"{error.name} is not installed"})


if __name__ == "__main__":
    main()
