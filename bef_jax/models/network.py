"""What every network here has in common: its switches, the boosts, and the classifier."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from bef_jax.models import boosted
from bef_jax.models.layers import BatchNorm, Bias, dense_init, global_pool


class Network(nn.Module):
    """images [N, H, W, 3], normalised, -> logits [N, num_classes], float32.

    Attributes:
        architecture: what tells one network of a family from another; its `stages` have fields
            `stride` and `repeats`, and come to a total stride of 32 with a stem of stride 2.
        total_stride: 32, 16 or 8 (`boosted.reduce_downsampling`).
        attention: `cbam` gates the output of every fused stage, on the trunk; or `none`.
        fusion: concatenates the pooled output of every fused stage to the head's features.
        fusion_stages: counted from 1; empty: the last stage of every resolution below the stem's.
        dropout: before the classifier.
        drop_path: of the last residual block, growing from 0 at the first; DenseNet has none.
        padding: where stride 2 pads: `same` (TensorFlow) or `symmetric` (torch).
        depthwise: the form of the depthwise convolution (`depthwise.depthwise_conv`), where the
            network has any.
        mbconv: how EfficientNet's blocks are trained: `layers`, or `pallas`, kernels for TPU.
        remat: `block`: of every block its input alone is kept for the gradient, and the rest is
            computed again; or `none`.
        bn_groups: parts of the batch with statistics of their own (`layers.BatchNorm`).
        folded: for inference, with the variables that `fold.fold_batch_norm` makes.
    """

    # Fields have `config.model`'s names: `models.create` hands them over as they are.
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

    def strides(self) -> tuple[int, tuple]:
        """The stem's stride and the stages, at the total stride asked for."""
        return boosted.reduce_downsampling(2, self.architecture.stages, self.total_stride)

    def norm(self, activation: str = "none", folded: bool | None = None) -> functools.partial:
        """Returns what makes a norm, by its name: a `BatchNorm`, or a `Bias` in a folded network.

        Args:
            activation: applied to the result.
            folded: False for a norm that follows no convolution to be folded into.
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

    def fused(self) -> tuple[int, ...]:
        """The stages that attention and fusion take, counted from 1."""
        # The architecture's own strides, not those after reduced downsampling: the choice would
        # move.
        strides = [stage.stride for stage in self.architecture.stages]
        return tuple(self.fusion_stages) or boosted.fused_stages(strides)

    def boost(self, x: Array, number: int, pooled: list[Array]) -> Array:
        """Applies attention and fusion after stage `number`, where they are asked for.

        Args:
            x: the features of the stage, [N, H, W, C].
            pooled: with fusion, the pooled features [N, C] of a fused stage are appended to it.

        Returns:
            The features that the next stage reads.
        """
        if number not in self.fused():
            return x
        if self.attention == "cbam":
            # On the trunk, not on a branch to the classifier: the next stage also sees the gated
            # features. The abstract leaves this open.
            x = boosted.CBAM(
                reduction=self.attention_reduction,
                kernel=self.attention_kernel,
                name=f"attention_{number}",
            )(x)
        if self.fusion:
            pooled.append(global_pool(x))
        return x

    def maybe_remat(self, block: type[nn.Module]) -> type[nn.Module]:
        """Returns the class of a block; with `remat` its gradient keeps the input alone.

        Blocks are called as `block(x, train)`.
        """
        # `train` (0 is self, 1 is x) decides what is traced. Draws and statistics are the same.
        return nn.remat(block, static_argnums=(2,)) if self.remat == "block" else block

    def block_indices(self, number: int) -> range:
        """Returns the indices of the blocks of stage `number`; the network counts them from 0."""
        # Numbered through, as the paper counts the blocks that it fuses.
        repeats = [stage.repeats for stage in self.architecture.stages]
        return range(sum(repeats[: number - 1]), sum(repeats[:number]))

    def drop_rate(self, index: int) -> float:
        """The rate of stochastic depth of block `index`."""
        # As in the EfficientNet paper's code: of n blocks the last has (n - 1) / n of the rate.
        return self.drop_path * index / sum(stage.repeats for stage in self.architecture.stages)

    def classify(self, features: Sequence[Array], train: bool) -> Array:
        """Pooled features, each [N, C], float32, -> logits [N, num_classes]."""
        # [N, sum of C]: of B3 1536 from the head and 600 from the fused stages. In float32, as
        # pooled, so that the classifier's rounding is not that of the maps.
        joined = jnp.concatenate([*features], axis=-1)
        # For whoever asks for the collection `intermediates`; else nothing is kept.
        self.sow("intermediates", "features", joined)
        joined = nn.Dropout(self.dropout, deterministic=not train)(joined)
        return nn.Dense(self.num_classes, kernel_init=dense_init, name="classifier")(joined)
