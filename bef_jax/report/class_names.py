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
    names = list(map(drawn_name, classes))
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [
        name if name and counts[name] == 1 else f"class {number} {name}".strip()
        for number, name in enumerate(names)
    ]


def drawn_name(name: str) -> str:
    """Returns the letters of a name that the font has, 24 at most; there may be none."""
    letters = "".join(c for c in printable(name) if ord(c) in _letters())
    name = " ".join(letters.split())
    half = (_LONGEST - 1) // 2
    return name if len(name) <= _LONGEST else f"{name[:half].strip()}…{name[-half:].strip()}"


def font_file() -> str:
    """Returns the path of the font, which comes with matplotlib."""
    from matplotlib.font_manager import FontProperties, findfont

    return findfont(FontProperties())


@functools.cache
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import get_font

    return frozenset(get_font(font_file()).get_charmap())
