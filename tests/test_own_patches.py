"""A folder of three classes and several patients: trained, resumed, loaded and evaluated."""

import numpy as np
import pytest
from PIL import Image

import bef_jax
from bef_jax import evaluate, train
from bef_jax.errors import UserError
from bef_jax.scoring import trained

pytestmark = pytest.mark.slow

CLASSES = ("fat tissue", "stroma", "tumour")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with a folder of 20 pictures for each class, of 10 patients."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(20):
            pixels = rng.integers(0, 256, (48, 48, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"P{number % 10}_{number}.png")
    return folder


@pytest.fixture
def make_config(folder, small_config):
    """Returns make_config(steps, **fields): what a user would say of the folder."""

    def make(steps, **fields):
        own = {"data.source": "image_folder", "data.dir": str(folder), "data.patch_size": 48}
        own |= {"data.group": r"(P\d+)_", "data.split_ratio": (0.6, 0.2, 0.2)}
        sizes = dict.fromkeys(("data.train_size", "data.valid_size", "data.test_size"))
        center = {"rcc.center": 0, "model.num_classes": 3}
        return small_config(steps=steps, **own | sizes | center | fields)

    return make


@pytest.fixture
def run(folder, make_config):
    """Returns the folder of a run of three steps, which the first test trains."""
    workdir = folder.parent / "run"
    if not workdir.exists():
        train.train_and_evaluate(make_config(3), workdir)
    return workdir


def test_a_run_is_resumed_by_a_command_that_names_no_classes(run, make_config):
    summary = train.train_and_evaluate(make_config(4), run)
    assert summary["step"] == 4
    assert tuple(summary["valid"]["per_class"]) == CLASSES
    assert summary["valid"]["ci95"]["resampled"] == "groups"


def test_the_checkpoint_knows_its_classes(run, folder):
    model = bef_jax.load(run)
    assert model.classes == CLASSES
    picture = np.asarray(Image.open(folder / "stroma" / "P0_0.png"))[None]
    assert model.predict(picture).shape == (1, 3)


def test_it_is_evaluated_without_a_configuration(run, make_config):
    path = trained.find(run)
    found = evaluate.evaluate_checkpoint(trained.scoring_config(path), path, "test")
    assert tuple(found["per_class"]) == CLASSES and found["n"] == 12
    with pytest.raises(UserError, match=r"leave out --config\.data\.classes"):
        trained.scoring_config(path, make_config(4), {"data.classes": CLASSES[::-1]})
