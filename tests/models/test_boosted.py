import itertools
import math

import pytest

from bef_jax.models.boosted import fused_stages, reduce_downsampling
from bef_jax.models.efficientnet import B0, SCALING, TEST, scaled


def strides_of(architecture):
    return [stage.stride for stage in architecture.stages]


def test_fused_stages_of_b3_end_in_blocks_4_7_17_and_25():
    b3 = scaled("b3")
    fused = fused_stages(strides_of(b3))
    ends = list(itertools.accumulate(stage.repeats for stage in b3.stages))
    assert fused == (2, 3, 5, 7)
    assert [ends[number - 1] - 1 for number in fused] == [4, 7, 17, 25]


@pytest.mark.parametrize(
    ("strides", "fused"),
    [
        ([1, 2, 2, 2, 2], (2, 3, 4, 5)),
        ([2, 1, 1, 2, 1], (3, 5)),
        ([1, 1, 2], (3,)),  # the stem's own resolution is left out
        ([1, 1], ()),
    ],
)
def test_fused_stages(strides, fused):
    assert fused_stages(strides) == fused


@pytest.mark.parametrize("architecture", [TEST, *map(scaled, SCALING)])
@pytest.mark.parametrize("total_stride", [32, 16, 8])
def test_total_stride(architecture, total_stride):
    stem, stages = reduce_downsampling(2, architecture.stages, total_stride)
    assert stem * math.prod(stage.stride for stage in stages) == total_stride
    for old, new in zip(architecture.stages, stages, strict=True):
        assert (new.channels, new.repeats, new.kernel) == (old.channels, old.repeats, old.kernel)


@pytest.mark.parametrize(
    ("total_stride", "stem", "strides"),
    [
        (32, 2, [1, 2, 2, 2, 1, 2, 1]),
        (16, 1, [1, 2, 2, 2, 1, 2, 1]),
        (8, 1, [1, 2, 2, 2, 1, 1, 1]),
    ],
)
def test_where_b0_loses_its_strides(total_stride, stem, strides):
    actual_stem, stages = reduce_downsampling(2, B0.stages, total_stride)
    assert (actual_stem, [stage.stride for stage in stages]) == (stem, strides)
