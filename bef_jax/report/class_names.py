"""Names of classes as a plot can draw them: short, different, and of letters that its font has."""

import functools
from collections.abc import Sequence

from bef_jax.errors import printable

_LONGEST = 24  # characters of a name in a plot


def drawn_names(classes: Sequence[str]) -> list[str]:
    """Returns a name for each class that a plot can draw.

    Letters that the font lacks are left out, and the middle of a long name. A class has its number
    before its name if the name is then empty, or equals another one.
    """
    names = [_shortened(_drawable(printable(name))) for name in classes]
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [
        name if name and counts[name] == 1 else f"class {number} {name}".strip()
        for number, name in enumerate(names)
    ]


def _shortened(name: str) -> str:
    half = (_LONGEST - 1) // 2
    return name if len(name) <= _LONGEST else f"{name[:half].strip()}…{name[-half:].strip()}"


def _drawable(name: str) -> str:
    return " ".join("".join(c for c in name if ord(c) in _letters()).split())


@functools.cache
def _letters() -> frozenset[int]:
    """Returns the code points that matplotlib's own font can draw."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())
