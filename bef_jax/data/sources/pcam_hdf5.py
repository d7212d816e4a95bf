"""PatchCamelyon's own files: camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 or .h5.gz."""

from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from bef_jax.data.chunk import Begin, Chunk, Contents, silent
from bef_jax.data.patch import READ_ORDER
from bef_jax.data.sources.description import PCAM, folder_identity, numbered_classes
from bef_jax.errors import UserError
from bef_jax.runtime.files import check_regular, user_path

DESCRIPTION = PCAM
identity = folder_identity


def open_source(data: ConfigDict, begin: Begin = silent) -> Contents:
    """Opens the source; its files are looked for when the first chunk is asked for, by `read`."""
    return Contents(read(data, begin), numbered_classes(data), DESCRIPTION.mpp)


def read(data: ConfigDict, begin: Begin = silent) -> Iterator[tuple[str, Chunk]]:
    """Yields (split, chunk) of PCam's HDF5 files in `data.dir`; the test split may be absent.

    The id of a patch is pcam_<split>_<row of the file>. With `data.download`, missing files are
    fetched first.

    Raises:
        UserError: a file is missing, damaged, or holds something other than PCam's patches.
    """
    from bef_jax.data.sources import hdf5, pcam_download

    folder = user_path(data.dir)
    if data.download:
        pcam_download.fetch_pcam(folder, begin=begin)
    # Look for all files first, so that a missing one is named before gigabytes are unpacked.
    paths = {split: _split_paths(folder, split) for split in READ_ORDER}
    for split, found in paths.items():
        if found is not None:
            yield from hdf5.read_split(split, *found, data[f"{split}_size"], begin)


def _split_paths(folder: Path, split: str) -> tuple[Path, Path] | None:
    stem = f"camelyonpatch_level_2_split_{split}"
    found = {name: _find(folder / f"{stem}_{name}.h5") for name in "xy"}
    if split == "test" and not any(found.values()):
        return None
    for name, path in found.items():
        if path is None:
            raise UserError(
                f"{folder / stem}_{name}.h5 (or .h5.gz): no such file; set config.data.dir, "
                "or fetch PCam with --config.data.download=True"
            )
    return found["x"], found["y"]


def _find(path: Path) -> Path | None:
    # Prefer the unpacked file, because unpacking costs minutes and room for a copy.
    candidates = (path, path.with_name(path.name + ".gz"))
    for candidate in candidates:
        check_regular(candidate)
    return next((candidate for candidate in candidates if candidate.is_file()), None)
