import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bef_jax.models.fold import fold_batch_norm
from tests.models.test_efficientnet import (
    BOOSTS,
    STILL,
    build,
    evaluate,
    make_images,
    make_variables,
    train,
)

EPSILON = 1e-3  # the configuration's default


@pytest.mark.parametrize(
    ("name", "pixels", "fields"),
    [
        ("test", 32, {}),
        ("test", 32, BOOSTS),
        ("test", 32, {"padding": "symmetric"}),
        ("b0", 64, {}),
    ],
)
def test_folded_network_equals_the_unfolded_one(name, pixels, fields):
    # The statistics are those of the images themselves, so that no layer's output explodes.
    fields = fields | STILL | {"bn_momentum": 0.0}
    network, folded = build(name, **fields), build(name, **fields, folded=True)
    variables, images = make_variables(network), make_images(16, pixels)
    variables["batch_stats"] = train(network, variables, images)[1]
    expected = evaluate(network, variables, images)
    actual = evaluate(folded, fold_batch_norm(variables, EPSILON), images)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_folded_variables_are_what_the_folded_network_takes():
    variables = make_variables(build("b0"))
    folded = fold_batch_norm(variables, EPSILON)
    wanted = jax.eval_shape(build("b0", folded=True).init, jax.random.key(0), make_images(1))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(folded).items()}
    assert shapes == {path: leaf.shape for path, leaf in flatten_dict(wanted).items()}
    assert "batch_stats" not in folded


def test_folding_leaves_its_input_alone():
    variables = make_variables(build("test"))
    before = jax.tree.map(np.copy, variables)
    fold_batch_norm(variables, EPSILON)
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_a_folded_network_does_not_train():
    network = build("test", folded=True)
    folded = fold_batch_norm(make_variables(build("test")), EPSILON)
    with pytest.raises(ValueError, match="folded"):
        network.apply(folded, make_images(1), train=True)


PROGRAM = """
import hashlib, jax
from bef_jax.models.fold import fold_batch_norm
from tests.models.test_fold import build, make_variables
text = jax.jit(fold_batch_norm).lower(make_variables(build("test")), 1e-3).as_text()
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_every_process_traces_the_same_program():
    """Traces in two processes, because the compilation cache finds only equal programs."""
    found = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] != ""
