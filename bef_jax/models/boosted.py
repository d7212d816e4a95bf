"""The changes that Boosted EfficientNet makes to a network of stages.

Wang et al., "Boosted EfficientNet: Detection of Lymph Node Metastases in Breast Cancer Using
Convolutional Neural Network", Cancers 2021, 13(4) 661. The first change, random center cropping, is
augmentation (`bef_jax.data.augment`). Reduced downsampling and the choice of the fused stages are
here. Attention is in `attention`, and `network` does the fusion.
"""

import dataclasses
from collections.abc import Sequence


def reduce_downsampling(stem_stride: int, stages: Sequence, total_stride: int) -> tuple[int, tuple]:
    """Lowers the network's total stride from 32 to 16 or 8 (RDS).

    16 removes the stem's stride, so every later map is twice as high and wide. 8 also removes the
    stride of the last stage of stride 2. At total stride 32, 16 and 8, a 96 px patch ends in 3x3,
    6x6 and 12x12 positions.

    Args:
        stages: dataclasses with a field `stride`; the total stride is 32 together with the stem.

    Returns:
        The stem's stride and the stages.
    """
    stages = list(stages)
    if total_stride == 8:
        # The last one, because only the maps after it grow, and these have the fewest positions.
        last = max(i for i, stage in enumerate(stages) if stage.stride == 2)
        stages[last] = dataclasses.replace(stages[last], stride=1)
    return (stem_stride if total_stride == 32 else 1), tuple(stages)


def fused_stages(strides: Sequence[int]) -> tuple[int, ...]:
    """Returns the last stage of every resolution below the stem's, counted from 1.

    In EfficientNet, these are stages 2, 3, 5 and 7. In B3, they end with block_04, block_07,
    block_17 and block_25.

    Args:
        strides: those of the stages at total stride 32, so that the choice is the same at 16 and 8.
    """
    # A resolution ends where the next stage has stride 2, and at the end of the network.
    following = [*strides[1:], 2]
    last_of_resolution = [i for i, stride in enumerate(following, 1) if stride == 2]
    # This leaves out stage 1 of EfficientNet, which has the stem's resolution, because the paper's
    # list begins with the last block of stage 2.
    return tuple(i for i in last_of_resolution if 2 in strides[:i])
