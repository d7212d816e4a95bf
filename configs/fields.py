"""The table of all fields of a configuration: what each may be, and what it affects.

`bef_jax.config` uses it to validate. Resuming, scoring, fine-tuning and the ablation use it to
compare two configurations. `default.py` has the default values and what they mean.
"""

import dataclasses
from typing import Any

# What a field affects:
NETWORK = "network"  # the weights, or what they mean: another value needs another checkpoint
OPTIMIZER = "optimizer"  # the state of training: another value cannot resume it (but see `off`)
INPUT = "input"  # the input and the precision of the network; the same weights fit
SCORE = "score"  # how logits become probabilities and decisions
TRAINING = "training"  # the result of a run
DATA = "data"  # which patches a run has
SPEED = "speed"  # time and memory; results differ by rounding at most
ENVIRONMENT = "environment"  # where and how a run works; not the weights or a patch's score

# The state counts steps in an int32. JAX keeps 32 bits of a seed, so 2**32 would be 0 again.
MOST_INT = 2**31 - 1
MOST_FLOAT = 3.4028234663852886e38  # the largest float32; larger numbers are infinite in JAX
MOST_IMAGES = 65_536  # of a batch: 1.8 GB of pixels at 96 px; also the most steps of a call
PATCH_SIDES = (32, 512)  # the smallest and the largest side of a patch, in pixels
MOST_CLASSES = 10_000
# A run takes these from its store where they are empty, so that its checkpoints have them.
FROM_STORE = ("data.classes", "data.mpp")


@dataclasses.dataclass(frozen=True)
class Field:
    """The possible values of one field, and what it affects.

    Attributes:
        affects: one of the words above.
        least, most: bounds of a number, both included.
        choices: all possible values, if they are few.
        off: the value that switches a mechanism off. If a field has one, a run can be resumed with
            another value, but not with the mechanism switched on or off.
    """

    affects: str
    least: float | None = None
    most: float | None = None
    choices: tuple = ()
    off: Any = None


FIELDS = {
    "name": Field(ENVIRONMENT),
    "seed": Field(TRAINING, 0, MOST_INT),
    "dtype": Field(INPUT, choices=("float32", "bfloat16")),
    "batch_size": Field(TRAINING, 1, MOST_IMAGES),
    "epochs": Field(TRAINING, 0, MOST_FLOAT),
    "steps": Field(TRAINING, 1, MOST_INT),
    "label_smoothing": Field(TRAINING, 0, 1),
    "ema_decay": Field(OPTIMIZER, 0, 1, off=0),
    "bn_groups": Field(TRAINING, 1, MOST_IMAGES),
    "log_every": Field(ENVIRONMENT, 1, MOST_INT),
    "steps_per_call": Field(SPEED, 1, MOST_IMAGES),
    "init_from": Field(TRAINING),
    "compile_cache": Field(ENVIRONMENT),
    "model.name": Field(NETWORK),  # choices: bef_jax.models.REGISTRY
    "model.num_classes": Field(NETWORK, 2, MOST_CLASSES),
    "model.total_stride": Field(NETWORK, choices=(32, 16, 8)),
    "model.attention": Field(NETWORK, choices=("none", "cbam")),
    "model.attention_reduction": Field(NETWORK, 1, MOST_INT),
    "model.attention_kernel": Field(NETWORK, 1, 192),
    "model.fusion": Field(NETWORK),
    "model.fusion_stages": Field(NETWORK),
    "model.dropout": Field(TRAINING, 0, 0.99),
    "model.drop_path": Field(TRAINING, 0, 0.99),
    "model.bn_momentum": Field(TRAINING, 0, 1),
    # No shape depends on epsilon, but the weights were trained with it. It is above 0, because the
    # variance of a constant channel is 0.
    "model.bn_epsilon": Field(NETWORK, 1e-12, MOST_FLOAT),
    "model.depthwise": Field(SPEED, choices=("auto", "native", "shift")),
    "model.mbconv": Field(SPEED, choices=("layers", "pallas")),
    "model.remat": Field(SPEED, choices=("none", "block")),
    "model.padding": Field(NETWORK, choices=("same", "symmetric")),
    "augment.flips": Field(TRAINING),
    "augment.stain": Field(TRAINING, 0, 1),
    "augment.stain_shift": Field(TRAINING, 0, 1),
    "augment.mean": Field(INPUT),
    "augment.std": Field(INPUT),
    "data.source": Field(DATA),  # choices: bef_jax.data.sources.SOURCES
    "data.dir": Field(DATA),
    "data.store": Field(DATA),
    "data.patch_size": Field(INPUT, *PATCH_SIDES),
    "data.resize": Field(DATA, choices=("none", "side", "mpp")),
    "data.mpp": Field(INPUT, 0, 1000),
    "data.classes": Field(NETWORK),
    "data.group": Field(DATA),
    "data.annotations": Field(DATA),
    "data.slide_patches": Field(DATA, 2, MOST_INT),
    "data.download": Field(DATA),
    "data.rectify": Field(DATA),
    "data.train_size": Field(DATA, 1, MOST_INT),
    "data.valid_size": Field(DATA, 1, MOST_INT),
    "data.test_size": Field(DATA, 1, MOST_INT),
    "data.split_ratio": Field(DATA),
    "data.seed": Field(DATA, 0, MOST_INT),
    "data.class_weights": Field(TRAINING, choices=("none", "balanced")),
    "data.sampling": Field(TRAINING, choices=("shuffled", "balanced")),
    "data.placement": Field(SPEED, choices=("auto", "device", "host")),
    # After data.patch_size, from which these follow: that one is then named first.
    "rcc.enabled": Field(INPUT),
    "rcc.center": Field(INPUT, 0, PATCH_SIDES[1]),
    "rcc.min_size": Field(TRAINING, 1, PATCH_SIDES[1]),
    "rcc.max_size": Field(TRAINING, PATCH_SIDES[0], PATCH_SIDES[1]),
    "rcc.eval_size": Field(INPUT, PATCH_SIDES[0], PATCH_SIDES[1]),
    "rcc.fill": Field(TRAINING, choices=("mean", "white")),
    "optim.name": Field(OPTIMIZER, choices=("adamw", "rmsprop", "sgd")),
    "optim.learning_rate": Field(TRAINING, 0, MOST_FLOAT),
    "optim.warmup_epochs": Field(TRAINING, 0, MOST_FLOAT),
    "optim.final_fraction": Field(TRAINING, 0, 1),
    "optim.weight_decay": Field(TRAINING, 0, MOST_FLOAT),
    "optim.momentum": Field(OPTIMIZER, 0, 1, off=0),
    "optim.clip_norm": Field(OPTIMIZER, 0, MOST_FLOAT, off=0),
    "optim.accumulate": Field(TRAINING, 1, MOST_IMAGES),
    "optim.layer_decay": Field(OPTIMIZER, 0, 1, off=1),
    "optim.freeze": Field(OPTIMIZER),
    "optim.head_only_steps": Field(OPTIMIZER, 0, MOST_INT, off=0),
    "eval.every_epochs": Field(TRAINING, 0, MOST_FLOAT),
    "eval.batch_size": Field(SPEED, 1, MOST_IMAGES),
    "eval.tta": Field(SCORE, choices=(1, 8)),
    "eval.threshold": Field(SCORE, 0, 1),
    "checkpoint.every_steps": Field(ENVIRONMENT, 1, MOST_INT),
    "checkpoint.keep": Field(ENVIRONMENT, 1, MOST_INT),
    "distributed.coordinator": Field(ENVIRONMENT),
    "distributed.num_processes": Field(ENVIRONMENT, 1, MOST_INT),
    "distributed.process_id": Field(ENVIRONMENT, 0, MOST_INT),
    "distributed.timeout_seconds": Field(ENVIRONMENT, 1, MOST_INT),
    "benchmark.runs": Field(ENVIRONMENT, 1, MOST_INT),
    "predict.stride": Field(ENVIRONMENT, 1, PATCH_SIDES[1]),
    "predict.engine": Field(SPEED, choices=("auto", "jax", "onnxruntime", "openvino")),
    "predict.dtype": Field(SPEED, choices=("float32", "bfloat16")),
    "slides.mpp": Field(ENVIRONMENT, 0, 1000),
    # These follow slides.mpp and rcc.center, which users set, and which errors name first.
    "data.slide_mpp": Field(DATA, 0, 1000),
    "data.slide_center": Field(DATA, 0, PATCH_SIDES[1]),
    "slides.top": Field(ENVIRONMENT, 1, MOST_INT),
    "slides.detection_threshold": Field(ENVIRONMENT, 0, 1),
    "slides.detection_radius": Field(ENVIRONMENT, 0, 100_000),
    "ablation.seeds": Field(ENVIRONMENT, 1, 1000),
    "ablation.rows": Field(ENVIRONMENT),
    "ablation.jobs": Field(ENVIRONMENT, 1, MOST_INT),
}


def affects(name: str) -> str:
    """Returns what a field affects, by its dotted name."""
    return FIELDS[name].affects
