"""The first minutes on a GPU: checks this package there, and times it beside timm.

    python results/gpu_check.py run --out=OUT [--seconds=440] [--stages=env,b3] [--tiny]

gpu_check.sh here starts it. Each stage is a process of its own with a limit (gpu_stages/), and
its record is appended to OUT/results.jsonl at once. So a run that is cut off keeps what it has. The
stages that say the most per second come first. --tiny runs them small, on a CPU too.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

RESULTS_FOLDER = Path(__file__).resolve().parent
# Logs and caches. A second run on the same machine finds what the first one compiled.
SCRATCH = Path(tempfile.gettempdir(), "gpu_check")
RESULTS = "results.jsonl"
LEAST_SECONDS = 12  # a stage that has less is not started, because it could not even import JAX
LAST_SECONDS = 5  # kept for the end of the run


@dataclass(frozen=True)
class Stage:
    """A stage: its name, its limit in seconds, the arguments of gpu_stages, more variables."""

    name: str
    limit: int
    command: str
    environment: dict[str, str] = field(default_factory=dict)


B3 = "efficientnet_b3 --batch=256"
B0 = "efficientnet_b0 --batch=256"
STAGES = [
    Stage("env", 40, "env"),
    # Compiles what later stages time, side by side: the slowest first.
    Stage("warm", 170, "warm b3_s16,b3,b3_shift,b0,timm_b3_compiled"),
    Stage("b3", 60, f"bench {B3} --profile"),
    Stage("timm_b3", 50, f"timm {B3}"),
    Stage("timm_b3_compiled", 110, f"timm {B3} --compile"),
    Stage("b3_shift", 60, f"bench {B3} --form=shift"),
    Stage("b3_s16", 70, f"bench {B3} --stride=16 --profile"),
    Stage("timm_b3_s16", 50, f"timm {B3} --stride=16"),
    Stage("numeric", 120, "numeric"),
    Stage("micro", 110, "micro"),
    Stage("b3_calls16", 70, f"bench {B3} --calls=16"),
    Stage("b3_b1024", 70, "bench efficientnet_b3 --batch=1024"),
    Stage("timm_b3_b1024", 40, "timm efficientnet_b3 --batch=1024"),
    Stage("b0", 50, f"bench {B0}"),
    Stage("timm_b0", 40, f"timm {B0}"),
    Stage("b0_nograph", 60, f"bench {B0}", {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}),
    Stage(
        "b0_convfusion", 60, f"bench {B0}",
        {"XLA_FLAGS": "--xla_gpu_experimental_enable_conv_fusion=true"},
    ),
    Stage("b0_notriton", 60, f"bench {B0}", {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}),
    Stage("b3_f32", 70, f"bench {B3} --dtype=float32"),
]  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", choices=("run",))
    parser.add_argument("--out", type=Path, required=True, help="a folder for the results")
    parser.add_argument("--seconds", type=float, default=440, help="time for all stages together")
    parser.add_argument("--limit", type=float, help="time for one stage, if its own is longer")
    parser.add_argument("--stages", default="", help="names with commas between them; empty: all")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    arguments = parser.parse_args()
    unknown = set(filter(None, arguments.stages.split(","))) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"--stages: unknown: {', '.join(sorted(unknown))}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Runs the stages, as long as there is time."""
    # So that a stage is not left behind if this program is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    end = time.monotonic() + arguments.seconds - LAST_SECONDS
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    SCRATCH.mkdir(parents=True, exist_ok=True)
    wanted = arguments.stages.split(",") if arguments.stages else [stage.name for stage in STAGES]
    flags = [f"--out={out}", *["--tiny"] * arguments.tiny]
    for stage in (stage for stage in STAGES if stage.name in wanted):
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            record = {"skipped": "no time left"}
        else:
            limit = min(stage.limit, left, arguments.limit or left)
            record = run_stage(stage.name, command_of(stage, *flags), limit, stage.environment)
        keep(out, {"stage": stage.name, **stage.environment, **record})
    print_table(out)


def command_of(stage: Stage, *flags: str) -> list[str]:
    """Returns the command that runs a stage, with more flags."""
    program = [sys.executable, "-m", "gpu_stages"]
    return [*program, *stage.command.split(), f"--name={stage.name}", *flags]


def run_stage(name: str, command: list[str], limit: float, environment: dict[str, str]) -> dict:
    """Runs a stage for at most `limit` seconds, and returns its record.

    A stage prints its record again whenever it has grown, so the last whole line counts. If the
    stage fails or is cut off, the record also has `rc` and `error`.
    """
    start = time.monotonic()
    printed, log = (SCRATCH / f"{name}.{suffix}" for suffix in ("jsonl", "log"))
    # Files, because a pipe can fill up, and one that a child still holds never ends.
    with printed.open("w") as stdout, log.open("w") as stderr:
        process = subprocess.Popen(
            command, env=variables() | environment, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            rc = process.wait(limit)
        except subprocess.TimeoutExpired:
            rc = "timeout"
        finally:  # also ends what the stage has started
            kill_group(process)
    record = last_record(printed.read_text())
    if rc != 0:
        record |= {"rc": rc, "error": log.read_text(errors="replace")[-600:]}
    return record | {"wall": round(time.monotonic() - start, 1)}


def kill_group(process: subprocess.Popen) -> None:
    """Kills a process and what it has started, if anything of it still runs."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def variables() -> dict[str, str]:
    """Returns the environment of every stage; what the user has set counts."""
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": str(SCRATCH / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "TORCHINDUCTOR_CACHE_DIR": str(SCRATCH / "inductor"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes share the GPU
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONUNBUFFERED": "1",
    }
    # Stages import this checkout, and each other.
    paths = [str(RESULTS_FOLDER.parent), str(RESULTS_FOLDER), os.environ.get("PYTHONPATH")]
    return defaults | os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def last_record(text: str) -> dict:
    """Returns the last whole line of JSON; a stage may have been cut off within a line."""
    lines = [line for line in text.splitlines(keepends=True) if line[:1] == "{"]
    whole = [line for line in lines if line[-1] == "\n"]
    return json.loads(whole[-1]) if whole else {}


def keep(out: Path, record: dict) -> None:
    """Appends a record to the results, and prints its beginning."""
    text = json.dumps(record)
    with (out / RESULTS).open("a") as file:
        file.write(text + "\n")
    print(text[:420], flush=True)


def print_table(out: Path) -> None:
    """Prints the speeds of all records, also of those that an earlier run left in `out`."""
    print("\nstage              train img/s   infer img/s   step ms   peak GB  compile s")
    for record in map(json.loads, (out / RESULTS).read_text().splitlines()):
        if "train" in record:
            print(
                f"{record['stage']:18s} {record['train']:11,.0f} {record.get('infer', 0):13,.0f}"
                f" {record['step_ms']:9.2f} {(record['peak_bytes'] or 0) / 1e9:9.2f}"
                f" {record['compile_seconds']:9.1f}"
            )


if __name__ == "__main__":
    run(parse_arguments())
