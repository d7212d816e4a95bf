import jax
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, Mesh

from bef_jax.runtime import target


def traced(mesh) -> bool:
    """What a program that is traced for `mesh` is told."""
    answers = []
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(lambda: answers.append(target.for_gpu()))
    return answers.pop()


@pytest.mark.parametrize(("platform", "expected"), [("gpu", True), ("tpu", False), ("cpu", False)])
def test_the_mesh_decides_not_this_machine(platform, expected):
    device = AbstractDevice("any", None, platform)
    mesh = AbstractMesh((2,), ("data",), abstract_device=device)
    assert traced(mesh) == expected


def test_without_a_mesh_the_answer_is_no():
    assert not target.for_gpu()


def test_a_mesh_of_this_machines_cpu():
    with jax.set_mesh(Mesh(np.array(jax.devices("cpu")[:1]), ("data",))):
        assert not target.for_gpu()
