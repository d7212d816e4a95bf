r"""Measures training and inference on a CPU, ours beside timm, onnxruntime and OpenVINO, in turn.

    python -m venv peer && peer/bin/pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31
    python results/cpu_speed.py FILE --peer=peer/bin/python \
        --model=efficientnet_b2 --total-stride=32 --work=infer

Each way is a process of its own, which stays and waits for its turn, so that all meet the machine's
slow moments. A round gives each way one run. FILE gets a line of JSON for each model, stride and
work: images/s of each way in each round, and the ratios of ours to theirs, medians over the rounds.
Float32, 96 px, two classes. Without --peer, timm is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent
OURS = {"train": ["bef_jax"], "infer": ["bef_jax", "onnxruntime", "openvino", "openvino_default"]}
PEERS = ["timm", "timm_compiled"]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--peer", help="the Python that has timm")
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--total-stride", type=int, default=32, choices=(32, 16))
    parser.add_argument("--work", default="infer", choices=("train", "infer"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of a run")
    parser.add_argument("--way", help="for the processes that this program starts")
    parser.add_argument("--answers", type=int, help="their file to answer to")
    return parser.parse_args()


# ---- one way, in its own process ----------------------------------------------------------------


def our_config(arguments: argparse.Namespace) -> object:
    """Returns a configuration without what timm's step does not do."""
    from bef_jax.configs.default import get_config

    config = get_config(f"model.name={arguments.model},model.total_stride={arguments.total_stride}")
    config.batch_size = config.eval.batch_size = arguments.batch_size
    config.ema_decay, config.optim.clip_norm, config.rcc.enabled = 0.0, 0.0, False
    config.augment.flips, config.augment.stain, config.augment.stain_shift = False, 0.0, 0.0
    config.model.drop_path = 0.0
    return config


def our_run(arguments: argparse.Namespace) -> Callable[[int], float]:
    """Returns run(steps) -> seconds of bef_jax, or of an engine on its network."""
    import jax
    import numpy as np

    from bef_jax.data.batches import Batch
    from bef_jax.planning import benchmark
    from bef_jax.runtime import compile_cache, sharding

    compile_cache.enable("auto")
    config, mesh = our_config(arguments), sharding.make_mesh()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (arguments.batch_size, 96, 96, 3), np.uint8)
    if arguments.way != "bef_jax":
        return engine_run(config, mesh, images, arguments.way)
    labels = rng.integers(0, 2, arguments.batch_size).astype(np.int32)
    batch = Batch(*(jax.device_put(x, sharding.by_rows(mesh)) for x in (images, labels)))
    call = benchmark.build(config, mesh, batch).calls[
        {"train": "train", "infer": "eval"}[arguments.work]
    ]
    return lambda steps: benchmark._seconds(call, steps) * steps


def engine_run(config: object, mesh: object, images: object, way: str) -> Callable[[int], float]:
    """Returns run(steps) -> seconds of an engine."""
    import jax

    from bef_jax.runtime import sharding
    from bef_jax.scoring.engines import choice
    from bef_jax.scoring.engines.sessions import open_session
    from bef_jax.scoring.scorer import make_fold
    from bef_jax.training.state import create_state

    variables = create_state(config, sharding.replicated(mesh)).eval_variables()
    content = choice.graph(config, jax.device_get(make_fold(config, mesh)(variables)))
    dtype = "bfloat16" if way == "openvino_default" else "float32"  # where the CPU has it
    session = open_session(way.removesuffix("_default"), content, dtype)
    return timed(lambda: session.run(images))


def timm_run(arguments: argparse.Namespace) -> Callable[[int], float]:
    """Returns run(steps) -> seconds of timm."""
    sys.path.insert(0, str(ROOT))
    import timm_throughput

    argv = [arguments.model.replace("efficientnet_lite", "tf_efficientnet_lite")]
    argv += ["train" if arguments.work == "train" else "eval"]
    argv += [f"--total-stride={arguments.total_stride}", f"--batch-size={arguments.batch_size}"]
    argv += ["--compile"] if arguments.way == "timm_compiled" else []
    return timed(timm_throughput.make_step(timm_throughput.parse_arguments(argv)))


def timed(step: Callable[[], object]) -> Callable[[int], float]:
    """Returns run(steps) -> seconds, for a step that returns when it is done."""

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - start

    return run


def serve(arguments: argparse.Namespace) -> None:
    """Warms up, then makes a run for each line on stdin, and prints its seconds."""
    run = timm_run(arguments) if arguments.way in PEERS else our_run(arguments)
    run(2)
    os.write(arguments.answers, b"ready\n")
    for line in sys.stdin:
        os.write(arguments.answers, f"{run(int(line))}\n".encode())


# ---- all ways in turn ---------------------------------------------------------------------------


class Way:
    """A way to compute, in a process that waits for its turn."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        """Starts the process, and waits until it has warmed up."""
        python = arguments.peer if name in PEERS else sys.executable
        command = [python, __file__, f"--way={name}", f"--model={arguments.model}"]
        command += [f"--total-stride={arguments.total_stride}", f"--work={arguments.work}"]
        command += [f"--batch-size={arguments.batch_size}"]
        environment = dict(os.environ)
        if name == "bef_jax":  # as the program sets it for itself
            from bef_jax.runtime.glibc import VARIABLE, settings

            environment[VARIABLE] = settings(len(os.sched_getaffinity(0)))
        answers, to_us = os.pipe()
        self.process = subprocess.Popen(
            [*command, f"--answers={to_us}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[to_us],
            env=environment,
            text=True,
        )
        os.close(to_us)
        self.answers = os.fdopen(answers)
        if self.answers.readline() != "ready\n":
            raise RuntimeError(f"{name} has failed: {' '.join(command)}")

    def seconds(self, steps: int) -> float:
        """Makes one run, and returns its seconds."""
        print(steps, file=self.process.stdin, flush=True)
        return float(self.answers.readline())


def measure(arguments: argparse.Namespace) -> dict:
    """Returns the images/s of all ways, and the ratios of ours to theirs."""
    names = OURS[arguments.work] + (PEERS if arguments.peer else [])
    ways = {name: Way(name, arguments) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    images = arguments.batch_size * arguments.steps
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            rates[name].append(images / way.seconds(arguments.steps))
    for way in ways.values():
        way.process.kill()
    ours = rates["bef_jax"]
    ratios = {
        name: statistics.median(mine / its for mine, its in zip(ours, found, strict=True))
        for name, found in rates.items()
        if name != "bef_jax"
    }
    facts = {key: getattr(arguments, key) for key in ("model", "total_stride", "work")}
    return facts | {"rates": rates, "ratios": ratios}


def main() -> None:
    """Serves one way, or measures all and appends a line to the file."""
    arguments = parse_arguments()
    if arguments.way:
        serve(arguments)
        return
    found = measure(arguments)
    with open(arguments.file, "a", encoding="utf-8") as file:
        print(json.dumps(found), file=file)
    print({name: round(statistics.median(x), 1) for name, x in found["rates"].items()})
    print({name: round(ratio, 2) for name, ratio in found["ratios"].items()})


if __name__ == "__main__":
    main()
