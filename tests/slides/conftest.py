"""Networks with random weights, which tests score slides with."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from bef_jax.configs import quickstart
from tests.conftest import SHRUNK


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Returns networks(classes): the workdir of a checkpoint for 0.972 um per pixel."""
    from bef_jax.runtime import sharding
    from bef_jax.training.checkpoint import Checkpoints
    from bef_jax.training.state import create_state

    made: dict[int, Path] = {}

    def make(classes: int = 2) -> Path:
        if classes not in made:
            config = quickstart.get_config()
            config.update_from_flattened_dict(
                SHRUNK | {"model.num_classes": classes, "data.mpp": 0.972}
            )
            state = create_state(config, sharding.replicated(sharding.make_mesh()))
            made[classes] = tmp_path_factory.mktemp(f"network_{classes}")
            checkpoints = Checkpoints(made[classes], keep=1)
            run = {"config": json.loads(config.to_json_best_effort())}
            checkpoints.save(0, state, run, None)
            checkpoints.close()
        return made[classes]

    return make


@pytest.fixture
def network(networks: Callable[[int], Path]) -> Callable[..., tuple[ConfigDict, Path]]:
    """Returns network(classes, **changes) -> (config, checkpoint)."""
    from bef_jax.scoring import trained

    def make(classes: int = 2, **changes) -> tuple[ConfigDict, Path]:
        best = trained.find(networks(classes))
        return trained.scoring_config(best, None, changes), best

    return make
