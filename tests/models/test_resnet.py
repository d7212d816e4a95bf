import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from bef_jax import models
from bef_jax.configs import resnet50
from bef_jax.models.layers import DropPath
from bef_jax.models.resnet import RESNET50, ResNet
from tests.models.test_efficientnet import count, shapes_of

PUBLISHED = 25_557_032


def shapes_of_calls(network, pixels):
    """Returns {path of a module: shape of its result}."""
    shapes = {}

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if context.method_name == "__call__":
            shapes["/".join(context.module.path)] = result.shape
        return result

    with nn.intercept_methods(record):
        shapes_of(network, pixels)
    return shapes


def test_parameter_count_is_the_published_one():
    model = resnet50.get_config("model.num_classes=1000").model
    assert count(models.create(model)) == PUBLISHED


def test_the_stride_is_in_the_3x3():
    shapes = shapes_of_calls(ResNet(RESNET50), 64)
    assert shapes["stem_norm"] == (1, 32, 32, 64)
    assert shapes["block_00/reduce_conv"] == (1, 16, 16, 64)  # after the max-pool
    assert shapes["block_03/reduce_conv"] == (1, 16, 16, 128)
    assert shapes["block_03/spatial_conv"] == (1, 8, 8, 128)
    assert shapes["block_03/shortcut_conv"] == (1, 8, 8, 512)


def test_the_shortcut_has_a_convolution_where_the_shape_changes():
    paths = flatten_dict(shapes_of(ResNet(RESNET50))["params"], sep="/")
    blocks = [path.split("/")[0] for path in paths if "shortcut_conv" in path]
    assert sorted(blocks) == ["block_00", "block_03", "block_07", "block_13"]


@pytest.mark.parametrize(
    ("stages", "rows"), [((), 256 + 512 + 1024 + 2048), ((1, 4), 256 + 2048), ((2,), 512 + 2048)]
)
def test_fusion_takes_the_last_stage_once(stages, rows):
    shapes = shapes_of(ResNet(RESNET50, fusion=True, fusion_stages=stages))
    assert shapes["params"]["classifier"]["kernel"].shape == (rows, 1000)


def test_drop_path_grows_linearly_from_0_over_all_blocks():
    rates = {}

    def record(call, args, kwargs, context):
        if isinstance(context.module, DropPath):
            rates[context.module.path[0]] = context.module.rate
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(ResNet(RESNET50, drop_path=0.32))
    assert rates == {f"block_{i:02d}": pytest.approx(0.32 * i / 16) for i in range(16)}


def test_bfloat16_parameters_stay_float32():
    leaves = flatten_dict(shapes_of(ResNet(RESNET50, dtype=jnp.bfloat16))).values()
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
