"""Augmentation on the device: in the jitted step, of whole batches, from uint8.

The random functions take a key, so that a batch is augmented the same way on any number of devices.
The order is: flips and turns, random center cropping, stain jitter, normalisation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from bef_jax.data.patch import eval_side

# Optical densities of haematoxylin, eosin and DAB (Ruifrok & Johnston 2001), one per row. The last
# is taken as the residual.
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)


def augment(key: Array, images: Array, config: ConfigDict) -> Array:
    """Augments and normalises a training batch for the network.

    Args:
        key: a typed PRNG key.
        images: [N, S, S, 3], uint8.
        config: the whole configuration; `rcc` and `augment` are read.

    Returns:
        [N, T, T, 3], float32, normalised; T is `patch.train_side`.
    """
    # Always make three, so that switching one augmentation off keeps the draws of the others.
    turn_key, window_key, stain_key = jax.random.split(key, 3)
    if config.augment.flips:
        # Turn and crop as uint8, because float32 would move four times as many bytes.
        images = random_symmetry(turn_key, images)
    inside = None
    if config.rcc.enabled:
        images, inside = random_center_crop(window_key, images, config.rcc)
    if config.augment.stain or config.augment.stain_shift:
        images = stain_jitter(stain_key, images, config.augment.stain, config.augment.stain_shift)
    x = normalise(images, config.augment)
    if inside is None:
        return x
    # Fill after normalisation: the mean is 0 there, and stain jitter cannot change the fill.
    fill = 0.0 if config.rcc.fill == "mean" else white(config.augment)
    return jnp.where(inside, x, fill)


def eval_inputs(images: Array, config: ConfigDict) -> Array:
    """Returns the inputs of the network in evaluation: the central crop, normalised, float32.

    Its side is `patch.eval_side`.
    """
    return normalise(center_crop(images, eval_side(config)), config.augment)


def normalise(images: Array, augment_config: ConfigDict) -> Array:
    """Returns (images / 255 - mean) / std per channel, as float32; images are in 0 .. 255."""
    # This form needs one multiplication and one addition per pixel, and no division.
    mean, std = (jnp.asarray(augment_config[name], jnp.float32) for name in ("mean", "std"))
    return images.astype(jnp.float32) * (1 / (255 * std)) - mean / std


def white(augment_config: ConfigDict) -> Array:
    """Returns the normalised value of a white pixel, [3]."""
    return normalise(jnp.full(3, 255, jnp.uint8), augment_config)


# ---- flips and turns ----------------------------------------------------------------------------


def symmetry(images: Array, which: Array) -> Array:
    """Applies one of a square's eight symmetries to each image.

    Args:
        images: [N, S, S, C].
        which: [N], integers in 0 .. 7; bit 0 flips top-bottom, bit 1 left-right, then bit 2
            transposes.
    """
    # Three selects cost less than a switch, which under vmap would compute all eight symmetries.
    bits = [(which >> bit & 1).astype(bool)[:, None, None, None] for bit in range(3)]
    images = jnp.where(bits[0], images[:, ::-1], images)
    images = jnp.where(bits[1], images[:, :, ::-1], images)
    return jnp.where(bits[2], images.swapaxes(1, 2), images)


def random_symmetry(key: Array, images: Array) -> Array:
    """Applies one of the eight symmetries to each image, all equally likely."""
    return symmetry(images, jax.random.randint(key, images.shape[:1], 0, 8))


# ---- random center cropping ---------------------------------------------------------------------


def random_center_crop(key: Array, images: Array, rcc: ConfigDict) -> tuple[Array, Array]:
    """Cuts a window of random size, at a random place around the center, from each image.

    Without a center (rcc.center=0) the window lies anywhere in the image.

    Args:
        images: [N, S, S, C].

    Returns:
        A canvas [N, T, T, C] with T = rcc.max_size around each window, at the patch's own scale;
        and a mask of the pixels that belong to the window, bool [N, T, T, 1].
    """
    sizes, corners = sample_windows(key, *images.shape[:2], rcc)
    return crop_windows(images, sizes, corners, rcc.max_size)


def sample_windows(key: Array, n: int, side: int, rcc: ConfigDict) -> tuple[Array, Array]:
    """Draws sides [n] uniformly from rcc.min_size .. max_size, then top left corners [n, 2].

    Each corner is uniform over the places where the window lies inside the patch, of `side`, and
    holds the whole central square of rcc.center.
    """
    # Draw the size first. Some sizes fit in more places, so they would come more often if all
    # windows were equally likely. randint excludes its upper end.
    size_key, corner_key = jax.random.split(key)
    sizes = jax.random.randint(size_key, (n,), rcc.min_size, rcc.max_size + 1)
    first, last = corner_bounds(sizes[:, None], side, rcc.center)
    return sizes, jax.random.randint(corner_key, (n, 2), first, last + 1)


def corner_bounds(size, side: int, center: int):
    """Returns the first and last corner where a window holds the center and is inside the patch.

    Args:
        size: side of the window, an integer or an array [n, 1].
        side: of the patch.
        center: side of the square in its middle; 0: there is none.
    """
    if not center:
        return 0, side - size
    margin = (side - center) // 2
    # The window must end at or after the square's end, and start at or before the square's start.
    return jnp.maximum(0, margin + center - size), jnp.minimum(margin, side - size)


def crop_windows(images: Array, sizes: Array, corners: Array, canvas: int) -> tuple[Array, Array]:
    """Cuts canvases of equal size around windows of any size; see `random_center_crop`."""
    # All canvases have one shape, so that one program handles windows of every size. The pixels
    # around a window are the patch's own and are masked later. Resampling the window to one shape
    # instead would change how large nuclei are.
    margin = (canvas - sizes[:, None]) // 2
    side = images.shape[1]
    # Keep the canvas inside the patch, because dynamic_slice would silently move one that is not.
    canvas_corners = jnp.clip(corners - margin, 0, side - canvas)
    if canvas < side:
        cut = jax.vmap(lambda image, at: jax.lax.dynamic_slice(
            image, (*at, 0), (canvas, canvas, image.shape[-1])
        ))  # fmt: skip
        images = cut(images, canvas_corners)
    positions = jnp.arange(canvas)
    # `first` is [N, 2, 1] and `within` is [N, 2, T], each for rows and for columns. The mask is the
    # outer product of the rows and the columns of `within`.
    first = (corners - canvas_corners)[..., None]
    within = (positions >= first) & (positions < first + sizes[:, None, None])
    return images, (within[:, 0, :, None] & within[:, 1, None, :])[..., None]


def center_crop(images: Array, size: int) -> Array:
    """Returns the central `size` x `size` of [N, S, S, C]."""
    first = (images.shape[1] - size) // 2
    for axis in (1, 2):
        # Brackets would become a gather where N is symbolic, as in an export.
        images = jax.lax.slice_in_dim(images, first, first + size, axis=axis)
    return images


# ---- stains -------------------------------------------------------------------------------------


def stain_jitter(key: Array, images: Array, scale: float, shift: float) -> Array:
    """Changes how strongly each patch is stained, as in Tellez et al. 2018.

    Light is absorbed exponentially, so stains add up in optical density, od = -ln(I / 255). In
    that space each patch's haematoxylin, eosin and residual get a factor in 1 -+ scale and an
    offset in -+ shift. Unmixing, scaling and mixing are one 3x3 matrix per patch.

    Args:
        images: [N, H, W, 3], 0 .. 255.

    Returns:
        [N, H, W, 3], float32, 0 .. 255.
    """
    scale_key, shift_key = jax.random.split(key)
    n = images.shape[0]
    # [N, 3] each: one value per patch and stain, because a slide is stained as a whole.
    factors = 1 + jax.random.uniform(scale_key, (n, 3), minval=-scale, maxval=scale)
    offsets = jax.random.uniform(shift_key, (n, 3), minval=-shift, maxval=shift)
    return restain(images, factors, offsets)


def restain(images: Array, factors: Array, offsets: Array) -> Array:
    """Multiplies each patch's stains by factors [N, 3] and adds offsets [N, 3] to them."""
    # Scale the rows to unit length, so that a shift means the same for each stain.
    stains = jnp.asarray(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))
    # [N, 3, 3]: one small product replaces three passes over the pixels.
    mix = jnp.einsum("ij,nj,jk->nik", jnp.linalg.inv(stains), factors, stains)
    density = -jnp.log((images.astype(jnp.float32) + 1) / 256)  # + 1: black stays finite
    density = jnp.einsum("nhwi,nik->nhwk", density, mix) + (offsets @ stains)[:, None, None]
    # Do not round to uint8, because that would cost a pass and add quantisation.
    return jnp.clip(256 * jnp.exp(-density) - 1, 0, 255)
