"""Writes the arrays of a store, patch by patch, and describes what they hold."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np

from bef_jax.data.chunk import Begin, Chunk, check_ids, silent
from bef_jax.data.duplicates import Duplicates
from bef_jax.data.patch import IMAGE_SHAPE, SPLITS
from bef_jax.errors import UserError
from bef_jax.runtime.files import sha256

DIGEST_BYTES = 16  # two of PCam's 327,680 patches collide with a chance of 1e-28


class StoreWriter:
    """Writes patches to the folders of their splits.

    Exact duplicates are dropped, if this is asked for, and reported (`duplicates`).
    """

    def __init__(self, folder: Path, rectify: bool):
        """Starts an empty store in `folder`, which exists and is empty."""
        self.folder = folder
        self.read_counts: Counter[str] = Counter()
        self._writers: dict[str, _SplitWriter] = {}
        self._duplicates = Duplicates(rectify)

    def add(self, split: str, chunk: Chunk) -> None:
        """Writes those patches of `chunk` that are kept."""
        if split not in self._writers:
            self._writers[split] = _SplitWriter(self.folder / split)
        self.read_counts[split] += len(chunk.labels)
        for image, label, name in zip(*chunk[:3], strict=True):
            digest = hashlib.sha256(image).digest()[:DIGEST_BYTES]
            if self._duplicates.keeps(digest, split, int(label), str(name)):
                self._writers[split].add(image, int(label), str(name), digest)

    def close(self, begin: Begin = silent) -> dict:
        """Completes the files and returns the part of the manifest that describes them.

        Args:
            begin: is called once, to show the progress of the checksums.

        Raises:
            UserError: train or valid holds no patch, a split of the source kept none, or two
                patches of a split have the same id.
        """
        # Training does not need a test split.
        for split in dict.fromkeys(["train", "valid", *self._writers]):
            if split not in self._writers or not self._writers[split].labels:
                raise UserError(
                    f"config.data: no patch is left in the {split} split, out of "
                    f"{self.read_counts[split]} read; check the source, or set "
                    "config.data.rectify=False to keep duplicates"
                )
        for writer in self._writers.values():
            writer.close()
        return self._counts() | {"content": self._content(), "files": self._files(begin)}

    def _counts(self) -> dict:
        labels = {
            split: self._writers[split].labels if split in self._writers else [] for split in SPLITS
        }
        return {
            "counts": {split: len(labels[split]) for split in SPLITS},
            "class_counts": {
                split: [labels[split].count(0), labels[split].count(1)] for split in SPLITS
            },
            "duplicates": self._duplicates.summary(),
        }

    def _content(self) -> dict[str, str]:
        samples = {split: writer.samples for split, writer in self._writers.items()}
        samples["total"] = [sample for split in samples.values() for sample in split]
        # Sort the samples, so that the same patches give the same checksum in any order.
        return {
            split: hashlib.sha256(b"".join(sorted(found))).hexdigest()
            for split, found in samples.items()
        }

    def _files(self, begin: Begin) -> dict[str, dict]:
        sizes = {file: file.stat().st_size for file in sorted(self.folder.glob("*/*.npy"))}
        # Read the files back, up to 8.4 GiB for PCam. A hash made while writing would miss the last
        # change of the header.
        advance = begin("checking files (sha256)", sum(sizes.values()), "bytes")
        return {
            file.relative_to(self.folder).as_posix(): {
                "bytes": size,
                "sha256": sha256(file, advance),
            }
            for file, size in sizes.items()
        }


class _SplitWriter:
    """Appends patches to the arrays of one split; only labels, ids and digests stay in memory.

    images.npy grows by ordinary writes, because a memory map's pages would count as our memory.
    """

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder = folder
        self.labels: list[int] = []
        self.ids: list[str] = []
        self.samples: list[bytes] = []  # the digest of a patch's pixels, then its label
        self._images = open(folder / "images.npy", "wb")  # noqa: SIM115 (close() closes it)
        self._header_bytes = self._write_header()

    def add(self, image: np.ndarray, label: int, name: str, digest: bytes) -> None:
        self._images.write(np.ascontiguousarray(image).data)
        self.labels.append(label)
        self.ids.append(name)
        self.samples.append(digest + bytes([label]))

    def close(self) -> None:
        with self._images:
            self._images.seek(0)
            # NumPy pads its header for a first axis that grows, so the pixels stay in place.
            if self._write_header() != self._header_bytes:
                raise RuntimeError(f"{self._images.name}: header of {len(self.ids)} patches grew")
        np.save(self.folder / "labels.npy", np.asarray(self.labels, np.uint8))
        # Each id is as wide as the longest, 4 bytes per character, because an array of objects
        # would be a pickle.
        ids = np.asarray(self.ids, str)
        check_ids(ids, f"config.data: ids of {self.folder.name}")
        np.save(self.folder / "ids.npy", ids)

    def _write_header(self) -> int:
        shape = (len(self.labels), *IMAGE_SHAPE)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._images, header)
        return self._images.tell()
