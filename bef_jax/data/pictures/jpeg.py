"""Plain JPEGs, which are decoded in half of Pillow's time, to the same pixels.

Nearly all patches in JPEG files are plain. imagecodecs has the same library, libjpeg-turbo, but
neither copies the pixels twice, nor needs Python while it decodes.
"""

import struct

import imagecodecs
import numpy as np

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAMES = (0xC0, 0xC2)  # baseline, progressive
_ANY_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_SCAN = 0xDA
# Tables, comments, and what applications write. Three of these are absent: Exif and XMP (0xE1) can
# turn a picture, and Adobe's mark (0xEE) can mean other colours.
_PLAIN = {0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)} - {0xE1, 0xEE}
_COMPONENTS = b"\1\2\3"  # JFIF's numbers of Y, Cb and Cr


def plain_size(content: bytes) -> tuple[int, int] | None:
    """Returns height and width of a plain JPEG in pixels; None of any other file.

    A plain JPEG has 8 bits, JFIF's colours, and no note that turns it. Its segments are read up to
    the first scan, as ITU-T T.81, annex B, defines them.

    Args:
        content: the whole file. It must be complete, because libjpeg fills what is missing.
    """
    if not (content.startswith(_START) and content.endswith(_END)):
        return None
    size, place = None, 2
    while place + 4 <= len(content):
        first, mark, length = struct.unpack_from(">BBH", content, place)
        if first != 0xFF or mark == _SCAN:
            return size if first == 0xFF else None
        if mark in _FRAMES:
            if size or not (size := _frame_size(content[place + 4 : place + 2 + length])):
                return None
        elif mark not in _PLAIN:
            return None
        place += 2 + length
    return None


def _frame_size(frame: bytes) -> tuple[int, int] | None:
    """Returns height and width from the content of a frame's segment, if it is a plain one."""
    if len(frame) != 15 or frame[6::3] != _COMPONENTS:
        return None
    bits, height, width, count = struct.unpack_from(">BHHB", frame)
    return (height, width) if (bits, count) == (8, 3) and height and width else None


def declared_size(content: bytes) -> tuple[int, int] | None:
    """Returns height and width that any JPEG declares; None if it has no frame before its scan.

    A decoder takes memory for them, whatever follows.
    """
    place = 2
    while place + 9 <= len(content):
        first, mark, length = struct.unpack_from(">BBH", content, place)
        if first != 0xFF or mark == _SCAN:
            return None
        if mark in _ANY_FRAME:
            return struct.unpack_from(">HH", content, place + 5)
        place += 1 if mark == 0xFF else 2 + length  # bytes of 0xFF may stand before a mark
    return None


def decode(content: bytes) -> np.ndarray | None:
    """Returns the pixels of a plain JPEG, uint8 [H, W, 3]; None if it is damaged."""
    try:
        return imagecodecs.jpeg8_decode(content)
    except imagecodecs.Jpeg8Error:
        return None
