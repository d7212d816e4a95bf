"""Training FLOPs against a count by hand, which is itself compared with the paper's figures."""

import math

import pytest

from bef_jax.configs.default import get_config
from bef_jax.models import efficientnet
from bef_jax.planning.flops import training_flops


def multiply_adds(architecture, size, total_stride=32, classes=2):
    """Counts those of one image's forward pass by hand, without attention and fusion."""
    side = math.ceil(size / (2 if total_stride == 32 else 1))
    channels = architecture.stem
    total = side**2 * 9 * 3 * channels
    for stage in architecture.stages:
        for repeat in range(stage.repeats):
            hidden = channels * stage.expand
            total += side**2 * channels * hidden if stage.expand > 1 else 0
            side = math.ceil(side / (stage.stride if repeat == 0 else 1))
            total += side**2 * stage.kernel**2 * hidden  # depthwise
            total += 2 * hidden * (channels // 4)  # squeeze and excitation
            total += side**2 * hidden * stage.channels
            channels = stage.channels
    return total + side**2 * channels * architecture.head + architecture.head * classes


# From Tan & Le 2019, table 2, which calls multiply-adds FLOPS.
@pytest.mark.parametrize(("variant", "size", "billions"), [("b0", 224, 0.39), ("b3", 300, 1.8)])
def test_the_hand_count_matches_the_paper(variant, size, billions):
    counted = multiply_adds(efficientnet.scaled(variant), size, classes=1000)
    assert counted / 1e9 == pytest.approx(billions, rel=0.05)


@pytest.mark.parametrize(
    ("variant", "fields"),
    [
        ("b0", {}),
        ("b0", {"model.total_stride": 16, "rcc.max_size": 64}),
        ("b0", {"model.attention": "cbam", "model.fusion": True, "rcc.enabled": False}),
    ],
)
def test_training_takes_six_flops_per_multiply_add(variant, fields):
    config = get_config()
    config.update_from_flattened_dict({"model.name": f"efficientnet_{variant}", **fields})
    size, stride = fields.get("rcc.max_size", 96), fields.get("model.total_stride", 32)
    counted = 3 * 2 * multiply_adds(efficientnet.scaled(variant), size, stride)
    # Attention adds a little; without it the counts are the same.
    tolerance = 0.1 if "model.attention" in fields else 1e-9
    assert training_flops(config) == pytest.approx(counted, rel=tolerance)
