"""Measures the images/s of timm on PyTorch, which README.md here compares with ours.

    python -m venv peer && peer/bin/pip install torch==2.14.1 torchvision==0.29.1 timm==1.0.31
    peer/bin/python results/timm_throughput.py efficientnet_b3 train [--total-stride=16] [--compile]

Run it in turn with `--mode=benchmark` and compare neighbouring runs, because on a shared machine
no other comparison means anything. The model runs eagerly unless --compile is given, in float32 and
channels_last (PyTorch's fastest layout on CPU), with fused AdamW. On a GPU add --device=cuda
--dtype=bfloat16 --steps=10 (gpu_stages/ here does).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import timm
import torch


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `argv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a name that timm knows")
    parser.add_argument("work", choices=("train", "eval"))
    parser.add_argument("--total-stride", type=int, default=32, choices=(32, 16))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=96, help="side of the images, in pixels")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="steps of a run, timed together")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile, which needs a C++ compiler"
    )
    return parser.parse_args(argv)


def make_step(arguments: argparse.Namespace) -> Callable[[], None]:
    """Returns a function that takes one step of the work, on a fixed random batch.

    On a GPU a call only starts the step.
    """
    device = arguments.device
    # For a GPU only: cuDNN tries its algorithms out, and float32 products use TF32, as JAX's do.
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    model = timm.create_model(arguments.model, num_classes=2)
    if arguments.total_stride == 16:
        model.conv_stem.stride = (1, 1)
    model = model.to(device, memory_format=torch.channels_last).train(arguments.work == "train")
    if arguments.compile:
        model = torch.compile(model)
    shape = (arguments.batch_size, 3, arguments.size, arguments.size)
    images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(arguments.batch_size, device=device) % 2
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    cast = torch.autocast(device, torch.bfloat16, enabled=arguments.dtype == "bfloat16")

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with cast:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    def evaluate() -> None:
        with torch.inference_mode(), cast:
            model(images)

    return train if arguments.work == "train" else evaluate


def seconds(step: Callable[[], None], arguments: argparse.Namespace) -> float:
    """Returns the mean seconds of a step, of the `arguments.steps` of a run."""
    start = time.perf_counter()
    for _ in range(arguments.steps):
        step()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / arguments.steps


def images_per_second(step: Callable[[], None], arguments: argparse.Namespace) -> float:
    """Returns the images/s of the median run, after two runs to warm up."""
    for _ in range(2):
        seconds(step, arguments)
    median = statistics.median(seconds(step, arguments) for _ in range(arguments.runs))
    return arguments.batch_size / median


def main() -> None:
    """Prints the arguments, the versions and the images/s of the median run, as a line of JSON."""
    arguments = parse_arguments()
    rate = images_per_second(make_step(arguments), arguments)
    versions = {"timm": timm.__version__, "torch": torch.__version__}
    print(json.dumps({**versions, **vars(arguments), "images_per_second": rate}))


if __name__ == "__main__":
    main()
