"""EfficientNet's block on TPU, as Pallas kernels that never write its expanded maps.

XLA puts what convolutions, norms and activations of a block make, forwards and backwards, through
memory one after the other, in maps of 6 times the block's input. Here the expansion is multiplied
again wherever it is wanted, from the narrow input, and of the wide maps the depthwise convolution's
result d alone is kept. It is written once and read four times: by `pool` and `project`, and by each
of the two kernels of the backward pass. (Copied as well, where a device has several groups.)

Maps are [H, W, C, N] (`grid`). K, E and M are the channels of the block's input, of its hidden maps
and of its output. A block without expansion has no `expand`: x has E channels, already activated.
"""
