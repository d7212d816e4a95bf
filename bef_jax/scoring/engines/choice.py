"""Chooses the engine that scores a network's patches on this machine.

An engine is used only if its scores of a batch agree with JAX's. The choice is kept beside the
compiled programs, so that a run that goes on takes the engine that it had.
"""

import functools
import hashlib
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from bef_jax.config import flatten
from bef_jax.configs.fields import INPUT, NETWORK, SPEED, affects
from bef_jax.errors import RunError, UserError
from bef_jax.models import create
from bef_jax.runtime import devices
from bef_jax.runtime.files import check_types, read_json, write_json
from bef_jax.scoring.engines.sessions import ENGINES, Session, open_session, version_of
from bef_jax.scoring.scorer import mean_probabilities, view_scores

LOG = logging.getLogger(__name__)

# The most that an engine's probability of a patch may differ from JAX's in float32. In bfloat16, a
# number has 8 significant bits, in every map of the network.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
_TIMED = 32  # patches of a call that is timed
_CALLS = 3
_FILE = "engines.json"

Run = Callable[[np.ndarray], np.ndarray]  # as `Session.run`


def choose(
    config: ConfigDict, folded: Callable[[], dict], run_jax: Run, images: np.ndarray
) -> Session | None:
    """Returns the engine that `config.predict.engine` asks for, or None for JAX.

    Args:
        config: as `trained.scoring_config` returns it for the checkpoint.
        folded: returns the network's variables, folded (`fold.fold_batch_norm`), on the host.
        run_jax: the network in JAX.
        images: uint8 [N, S, S, 3], on which engines are compared with JAX, and timed.

    Raises:
        UserError: the engine that is asked for is not installed.
        RunError: its probabilities differ from JAX's by more than `TOLERANCE`.
    """
    asked, dtype = config.predict.engine, config.predict.dtype
    names = [name for name in ENGINES if version_of(name)] if asked == "auto" else [asked]
    kept = _kept(config) if asked == "auto" else None
    if kept is not None:
        names = [name for name in names if name == kept]
    if not names:
        return None
    content, sessions = functools.cache(lambda: graph(config, folded())), {}
    for name in names:
        try:
            session = open_session(name, content(), dtype)
            sessions[name] = _checked(session, config, run_jax, images)
        except Exception as error:  # engines have their own; so has a network that ONNX lacks
            if asked != "auto":
                raise
            LOG.warning("%s is not used: %s", name, error)
    if asked != "auto" or kept is not None or not sessions:
        return next(iter(sessions.values()), None)
    return _fastest(config, sessions, run_jax, images)


def graph(config: ConfigDict, folded: dict) -> bytes:
    """Returns the network as an ONNX file: patches, uint8 [n, S, S, 3], to scores of one view."""
    from bef_jax.models.onnx.graph import to_onnx

    model, side = create(config.model, folded=True), config.data.patch_size
    (count,) = jax.export.symbolic_shape("n")
    spec = jax.ShapeDtypeStruct((count, side, side, 3), np.uint8)
    one_view = config.copy_and_resolve_references()
    one_view.eval.tta = 1
    return to_onnx(lambda x: (view_scores(model, one_view, folded, x, 0),), spec, ["scores"])


def _checked(session: Session, config: ConfigDict, run_jax: Run, images: np.ndarray) -> Session:
    found, expected = (mean_probabilities([run(images)]) for run in (session.run, run_jax))
    difference = float(np.abs(found - expected).max())
    # JAX itself is as inexact as that where the network was trained in bfloat16.
    is_exact = session.dtype == config.dtype == "float32"
    tolerance = TOLERANCE["float32" if is_exact else "bfloat16"]
    if not difference <= tolerance:  # so that NaN fails, too
        raise RunError(
            f"probabilities by {session.engine} differ from JAX's by {difference:.2g}, more than "
            f"{tolerance}; give --config.predict.engine=jax"
        )
    return session


# ---- which is fastest ---------------------------------------------------------------------------


def _fastest(
    config: ConfigDict, sessions: dict[str, Session], run_jax: Run, images: np.ndarray
) -> Session | None:
    """Times JAX and the engines in turn, keeps the choice, and returns it."""
    calls = {"jax": lambda: run_jax(images)}
    batch = images[:_TIMED]
    calls |= {name: lambda run=each.run: run(batch) for name, each in sessions.items()}
    sizes = {name: len(images if name == "jax" else batch) for name in calls}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_CALLS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    rates = {name: sizes[name] / statistics.median(found) for name, found in seconds.items()}
    best = max(rates, key=rates.get)
    LOG.info("patches/s: %s", ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items()))
    _keep(config, best)
    return sessions.get(best)


def _file() -> Path | None:
    """Returns the file of choices, beside the compiled programs; None if these are not kept."""
    folder = jax.config.jax_compilation_cache_dir
    return Path(folder) / _FILE if folder else None


def _key(config: ConfigDict) -> str:
    """Returns what decides which engine is the fastest, as hex digits."""
    fields = flatten(config)
    facts = {
        "fields": {k: str(x) for k, x in fields.items() if affects(k) in (NETWORK, INPUT, SPEED)},
        "versions": {name: version_of(name) for name in ENGINES} | {"jax": jax.__version__},
        "machine": [platform.processor(), platform.node(), devices.cores()],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read() -> dict[str, str]:
    file = _file()
    if file is None:
        return {}
    try:
        return read_json(file, check_types, "it is made again")
    except FileNotFoundError:
        return {}
    except UserError as error:
        LOG.warning("%s", error)
        return {}


def _kept(config: ConfigDict) -> str | None:
    return _read().get(_key(config))


def _keep(config: ConfigDict, engine: str) -> None:
    if file := _file():
        try:
            write_json(file, _read() | {_key(config): engine})
        except OSError as error:
            LOG.warning("%s: the choice of an engine can't be kept: %s", file, error)
