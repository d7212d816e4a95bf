"""Names of classes as plots, files and texts can show them."""

import functools
from collections.abc import Sequence

from bef_jax.data.patch import PCAM_CLASSES
from bef_jax.errors import printable

_LONGEST = 24  # characters of a name in a plot
_LONGEST_FILE = 60  # bytes of a name in a file's name, because a file system allows 255 in all


def positive_name(classes: Sequence[str]) -> str:
    """Returns how a text names class 1 of two classes, as in "the probability of ..."."""
    return "a metastasis" if tuple(classes) == PCAM_CLASSES else classes[1]


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


def file_name(number: int, classes: Sequence[str]) -> str:
    """Returns the name of a class's file, without a suffix: its number, and what fits of its name.

    The number makes the name unique, also where a file system ignores the case. Other characters
    than letters, digits, "-" and "_" become "_", because a class may be called a/b or con:.
    """
    safe = "".join(c if c.isalnum() or c in "-_" else "_" for c in classes[number])
    # Cut bytes, not characters, and leave out a character that was cut into.
    short = safe.encode()[:_LONGEST_FILE].decode(errors="ignore")
    return f"{number:0{len(str(len(classes) - 1))}}_{short}"
