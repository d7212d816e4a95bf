"""EfficientNet's block as experimental Pallas kernels for TPU, off by default.

No TPU has run these kernels yet. They are compiled for v5e, v5p and v6e, and tests compare their
results with those of the layers (`efficientnet.MBConv`) on a simulated TPU.
`--config.model.mbconv=pallas` switches them on for training.

XLA passes the results of a block's convolutions, norms and activations through memory one by one,
forwards and backwards, as maps of 6 times the block's input. The kernels never write the expanded
maps. They compute the expansion again from the narrow input wherever they need it. The only wide
map that they keep is d, the result of the depthwise convolution. It is written once and read four
times: by `pool`, by `project`, and by each of the two kernels of the backward pass. (If a device
has several groups, d is also copied.)

Maps are [H, W, C, N] (`grid`). K, E and M are the channels of the block's input, of its hidden maps
and of its output. A block without expansion has no `expand`; its x has E channels and is already
activated.
"""
