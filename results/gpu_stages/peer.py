"""The stages `timm`: training and inference of timm's network of the same name."""

import argparse

import timm_throughput
import torch

from gpu_stages import emit


def timm(options: argparse.Namespace) -> None:
    """Times training, then inference."""
    record = {"stride": options.stride, "dtype": options.dtype, "compiled": options.compile}
    for work, name in (("train", "train"), ("eval", "infer")):
        arguments = peer_arguments(options, work)
        step = timm_throughput.make_step(arguments)
        once = argparse.Namespace(**vars(arguments) | {"steps": 1})
        first = timm_throughput.seconds(step, once)  # compiles
        if not options.only_compile:
            record[name] = timm_throughput.images_per_second(step, arguments)
        if name in record and work == "train":
            step_ms = 1e3 * arguments.batch_size / record["train"]
            record |= {"model": arguments.model, "batch": arguments.batch_size, "step_ms": step_ms}
            record |= {"compile_seconds": first, "peak_bytes": peak_bytes()}
        emit(record)


def peer_arguments(options: argparse.Namespace, work: str) -> argparse.Namespace:
    """Returns what timm_throughput.py is to measure."""
    network, batch = ("efficientnet_b0", 8) if options.tiny else (options.subject, options.batch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    argv = [network, work, f"--total-stride={options.stride}", f"--batch-size={batch}"]
    argv += [f"--dtype={options.dtype}", f"--device={device}", *["--compile"] * options.compile]
    argv += ["--runs=1", "--steps=1"] if options.tiny else ["--runs=5", "--steps=10"]
    return timm_throughput.parse_arguments(argv)


def peak_bytes() -> int | None:
    """Returns the most bytes that the GPU held; None on a CPU, where torch does not count."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
