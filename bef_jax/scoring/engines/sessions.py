"""The inference engines: which are installed, and how each loads an ONNX graph."""

import dataclasses
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from bef_jax.errors import UserError, install_command
from bef_jax.runtime import devices

_EXTRAS = {"onnxruntime": "export", "openvino": "openvino"}  # what installs each engine
ENGINES = tuple(_EXTRAS)


@dataclasses.dataclass(frozen=True)
class Session:
    """A network in an engine.

    Attributes:
        engine: its name, in `ENGINES`.
        dtype: in which it computes: float32 or bfloat16.
        run: takes uint8 [N, S, S, 3] and returns the scores, float32 [N] or [N, K].
    """

    engine: str
    dtype: str
    run: Callable[[np.ndarray], np.ndarray]


def version_of(engine: str) -> str | None:
    """Returns the version of an engine, or None if it, or what translates for it, is missing."""
    try:
        metadata.version("onnx")
        return metadata.version(engine)
    except metadata.PackageNotFoundError:
        return None


def check_installed(engine: str) -> None:
    """Raises `UserError` if an engine is not installed."""
    if version_of(engine) is None:
        raise UserError(
            f"config.predict.engine={engine} is not installed: {install_command(_EXTRAS[engine])}"
        )


def open_session(engine: str, content: bytes, dtype: str) -> Session:
    """Loads an ONNX file with the input `image` and one output into an engine.

    It uses as many threads as the process may use cores.

    Args:
        content: of the file.
        dtype: float32, or bfloat16 if the engine and the CPU may use it. They do where the CPU has
            instructions for it (AMX or AVX512-BF16); elsewhere it would be slower.
    """
    return {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}[engine](content, dtype)


def _open_onnxruntime(content: bytes, dtype: str) -> Session:
    import onnxruntime

    del dtype  # its convolutions on x86 are float32 only
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = devices.cores()
    options.log_severity_level = 4  # fatal errors only, because errors are also raised
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    return Session("onnxruntime", "float32", lambda images: session.run(None, {"image": images})[0])


def _open_openvino(content: bytes, dtype: str) -> Session:
    # OpenVINO tells its makers of each import, over the network and from a fork of this process. If
    # the package that does it cannot be imported, it goes on without.
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    core = openvino.Core()
    has_bfloat16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    used = "bfloat16" if dtype == "bfloat16" and has_bfloat16 else "float32"
    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": devices.cores(),
        "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[used],
    }
    compiled = core.compile_model(core.read_model(content), "CPU", settings)
    return Session("openvino", used, lambda images: compiled(images)[0])
