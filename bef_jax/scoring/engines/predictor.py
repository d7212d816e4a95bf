"""A scorer that uses the fastest engine of this machine; `choice` finds it."""

import functools
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bef_jax.data.sources.synthetic import drawn_patches
from bef_jax.errors import UserError
from bef_jax.runtime import sharding
from bef_jax.scoring import scorer
from bef_jax.scoring.engines.choice import choose
from bef_jax.scoring.engines.sessions import Session, check_installed

LOG = logging.getLogger(__name__)

# Patches from which on another engine than JAX is looked for. To load and time the engines takes
# some seconds, in which JAX scores up to thousands of patches.
WORTH = 4096
_DRAWN = 32  # patches on which engines are compared before any other patch is there


class EngineScorer:
    """A `scorer.Scorer` that turns to another engine than JAX where that is faster.

    Without `expect`, it counts patches, and turns when there were `WORTH`.
    """

    def __init__(self, config: ConfigDict, variables: dict, mesh: Mesh):
        """Starts with JAX.

        Args:
            config: as `trained.scoring_config` returns it for the checkpoint.
            variables: of the network, on the devices.
            mesh: of the devices.

        Raises:
            UserError: `config.predict.engine` is not installed, or several processes share the
                work, which only JAX can.
        """
        self._config, self._variables, self._mesh = config, variables, mesh
        self._by_jax = scorer.make_scorer(config, mesh)(variables)
        self._session: Session | None = None
        self._seen = 0
        asked = config.predict.engine
        if asked not in ("auto", "jax"):
            check_installed(asked)
            if jax.process_count() > 1:
                raise UserError(f"config.predict.engine={asked} runs in one process: give jax")
        # Engines take the CPU. On accelerators and with several devices, `auto` is JAX.
        on_cpu = jax.default_backend() == "cpu" and mesh.size == 1
        self._is_settled = asked == "jax" or (asked == "auto" and not on_cpu)

    @property
    def engine(self) -> str:
        """Returns what scores the next patches, and in which dtype."""
        if self._session is None:
            return f"jax {self._config.dtype}"
        return f"{self._session.engine} {self._session.dtype}"

    def expect(self, count: int) -> None:
        """Chooses the engine for `count` patches now, so that no later batch changes it."""
        if not self._is_settled and self._is_worth(count):
            self._settle(drawn_patches(self._config.data.patch_size, _DRAWN))
        self._is_settled = True

    def __call__(self, images: Array) -> list[Any]:
        """Returns the scores under each view; see `scorer.Scorer`."""
        self._seen += len(images)
        if not self._is_settled and self._is_worth(self._seen):
            self._settle(np.asarray(images))
        if self._session is None:
            return self._by_jax(images)
        patches = np.asarray(images)  # on a CPU this copies nothing
        return [
            _Pending(self._thread.submit(self._session.run, _turned(patches, view)))
            for view in range(self._config.eval.tta)
        ]

    def _is_worth(self, count: int) -> bool:
        return self._config.predict.engine != "auto" or count >= WORTH

    def _settle(self, images: np.ndarray) -> None:
        def run_jax(images: np.ndarray) -> np.ndarray:
            on_device = jax.device_put(images, sharding.by_rows(self._mesh))
            return jax.device_get(self._by_jax(on_device)[0])

        def folded() -> dict:
            return jax.device_get(scorer.make_fold(self._config, self._mesh)(self._variables))

        self._session = choose(self._config, folded, run_jax, images)
        self._is_settled = True
        LOG.info("scoring by %s", self.engine)

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        # One thread, so that the next batch is gathered while the engine scores, as with JAX.
        return ThreadPoolExecutor(1, "engine")


class _Pending:
    """Scores that another thread computes; `jax.device_get` waits for them."""

    def __init__(self, future: Future):
        self._future = future

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._future.result(), dtype)


def _turned(images: np.ndarray, view: int) -> np.ndarray:
    """Returns images [N, S, S, 3] under one of the eight symmetries, as `augment.symmetry` does."""
    images = images[:, ::-1] if view & 1 else images
    images = images[:, :, ::-1] if view & 2 else images
    return np.ascontiguousarray(images.swapaxes(1, 2) if view & 4 else images)
