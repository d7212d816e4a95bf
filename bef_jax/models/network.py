"""The parts that all networks share: their options, attention and fusion, and the classifier."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bef_jax.models import boosted
from bef_jax.models.attention import CBAM
from bef_jax.models.layers import BatchNorm, Bias, dense_init, global_pool


class Network(nn.Module):
    """A network: normalised images [N, H, W, 3] -> logits [N, num_classes], float32.

    Attributes:
        architecture: what differs between the networks of a family. Its `stages` have fields
            `stride` and `repeats`. With a stem of stride 2, the total stride is 32.
        total_stride: 32, 16 or 8 (`boosted.reduce_downsampling`).
        attention: `cbam` gates the output of every fused stage, on the trunk, even if `fusion` is
            off; or `none`.
        fusion: concatenates the pooled output of every fused stage to the head's features.
        fusion_stages: the fused stages, after which attention and fusion act; counted from 1.
            Empty: the last stage of every resolution below the stem's.
        dropout: rate before the classifier.
        drop_path: rate of stochastic depth. Block i of n, counted from 0, has i / n of it. DenseNet
            has none.
        padding: where stride 2 pads: `same` (TensorFlow) or `symmetric` (torch).
        depthwise: form of the depthwise convolution (`depthwise.depthwise_conv`), if there is one.
        mbconv: how EfficientNet's blocks are trained: by `layers`, or by `pallas`, which are
            experimental kernels for TPU.
        remat: `block` keeps only the input of every block for the gradient, and computes the rest
            again; or `none`.
        bn_groups: number of parts of the batch with their own statistics (`layers.BatchNorm`).
        folded: for inference, with the variables that `fold.fold_batch_norm` makes.
    """

    # The fields of `config.model` keep their names, because `models.create` passes them on
    # unchanged. It adds architecture, bn_groups, folded and dtype.
    architecture: Any
    num_classes: int = 1000
    total_stride: int = 32
    attention: str = "none"
    attention_reduction: int = 16
    attention_kernel: int = 7
    fusion: bool = False
    fusion_stages: tuple[int, ...] = ()
    dropout: float = 0.2
    drop_path: float = 0.2
    padding: str = "same"
    depthwise: str = "auto"
    mbconv: str = "layers"
    remat: str = "none"
    bn_momentum: float = 0.9
    bn_epsilon: float = 1e-3
    bn_groups: int = 1
    folded: bool = False
    dtype: jnp.dtype = jnp.float32

    def stem_stride_and_stages(self) -> tuple[int, tuple]:
        """Returns the stem's stride and the stages after reduced downsampling."""
        return boosted.reduce_downsampling(2, self.architecture.stages, self.total_stride)

    def make_norm(self, activation: str = "none", folded: bool | None = None) -> functools.partial:
        """Returns a function that makes a norm: a `BatchNorm`, or a `Bias` in a folded network.

        Args:
            activation: applied to the result.
            folded: None: as the network. False: never, because the norm stands before its
                convolution, and only a norm after a convolution can be folded into it.
        """
        if self.folded if folded is None else folded:
            return functools.partial(Bias, dtype=self.dtype, activation=activation)
        return functools.partial(
            BatchNorm,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            groups=self.bn_groups,
            dtype=self.dtype,
            activation=activation,
        )

    def fused_stages(self) -> tuple[int, ...]:
        """Returns the stages after which attention and fusion act, counted from 1."""
        # These are the strides before reduced downsampling, so that the choice does not depend on
        # it.
        strides = [stage.stride for stage in self.architecture.stages]
        return tuple(self.fusion_stages) or boosted.fused_stages(strides)

    def attend_and_fuse(self, x: Array, number: int, pooled: list[Array]) -> Array:
        """Applies attention and fusion after stage `number`, if they are switched on.

        Args:
            x: the features of the stage, [N, H, W, C].
            pooled: with fusion, gets the pooled features [N, C] of a fused stage appended.

        Returns:
            The features that the next stage reads.
        """
        if number not in self.fused_stages():
            return x
        if self.attention == "cbam":
            # The gate is on the trunk, not on a branch to the classifier, so the next stage also
            # sees the gated features. The abstract of Wang et al. does not say which.
            x = CBAM(
                reduction=self.attention_reduction,
                kernel=self.attention_kernel,
                name=f"attention_{number}",
            )(x)
        if self.fusion:
            pooled.append(global_pool(x))
        return x

    def maybe_remat(self, block: type[nn.Module]) -> type[nn.Module]:
        """Returns the class of a block; with `remat`, its gradient keeps only the block's input.

        Blocks are called as `block(x, train)`.
        """
        # Argument 2 is `train`, after self and x. It is static because it decides what is traced.
        # The second computation draws the same random numbers and takes the same statistics.
        return nn.remat(block, static_argnums=(2,)) if self.remat == "block" else block

    def block_indices(self, number: int) -> range:
        """Returns the indices of the blocks of stage `number`; the network counts them from 0."""
        # The numbers go on from stage to stage, as in the list of fused blocks of Wang et al.
        repeats = [stage.repeats for stage in self.architecture.stages]
        return range(sum(repeats[: number - 1]), sum(repeats[:number]))

    def drop_rate(self, index: int) -> float:
        """Returns the rate of stochastic depth of block `index`."""
        # As in the EfficientNet paper's code, the last of n blocks has (n - 1) / n of the rate.
        return self.drop_path * index / sum(stage.repeats for stage in self.architecture.stages)

    def classify(self, features: Sequence[Array], train: bool) -> Array:
        """Returns logits [N, num_classes] from pooled features, each [N, C], all in float32."""
        # [N, sum of C]: 1536 from B3's head and 600 from its fused stages. They stay in float32, so
        # that the classifier does not round its results to the dtype of the maps.
        joined = jnp.concatenate([*features], axis=-1)
        # Flax keeps the features only for a caller that asks for the collection `intermediates`.
        self.sow("intermediates", "features", joined)
        joined = nn.Dropout(self.dropout, deterministic=not train)(joined)
        return nn.Dense(self.num_classes, kernel_init=dense_init, name="classifier")(joined)
