"""The scale that a TIFF's tags give."""

_MICROMETRES = {2: 25_400, 3: 10_000}  # in TIFF's units, inch and centimetre
_SCALES = (0.05, 20)  # um/px of microscopes; 72 and 300 dots per inch are for screens and paper


def mpp_of_tags(resolution: float | None, unit: int | None) -> float | None:
    """Returns the micrometres per pixel that a TIFF's pixels per unit mean.

    It is None unless the scale is one of a microscope.
    """
    if not resolution or unit not in _MICROMETRES:
        return None
    mpp = _MICROMETRES[unit] / float(resolution)
    return mpp if is_microscopic(mpp) else None


def is_microscopic(mpp: float) -> bool:
    """Returns whether a scale, in micrometres per pixel, is one of a microscope."""
    return _SCALES[0] <= mpp <= _SCALES[1]
