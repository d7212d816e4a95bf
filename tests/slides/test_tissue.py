"""The saturation of colours, compared with exact fractions."""

from fractions import Fraction

import numpy as np

from bef_jax.slides.tissue import is_coloured


def test_each_pair_of_greatest_and_least_value_is_decided_exactly():
    values = [(most, least) for most in range(256) for least in range(most + 1)]
    pixels = np.array([(least, most, (most + least) // 2) for most, least in values], np.uint8)
    expected = [
        most > 0 and Fraction(most - least, most) >= Fraction(7, 100) for most, least in values
    ]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        assert is_coloured(pixels[:, order]).tolist() == expected


def test_axes_before_the_colours_stay():
    pixels = np.zeros((2, 3, 5, 3), np.uint8)
    pixels[1, 2, 4] = (200, 100, 150)
    assert np.argwhere(is_coloured(pixels)).tolist() == [[1, 2, 4]]
    assert not is_coloured(np.uint8([0, 0, 0]))
