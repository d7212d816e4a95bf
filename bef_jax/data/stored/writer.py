"""Writes the arrays of a store, patch by patch, and describes what they hold."""

import hashlib
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bef_jax.data.chunk import Begin, Chunk, check_ids, silent
from bef_jax.data.patch import SPLITS, label_dtype
from bef_jax.errors import UserError
from bef_jax.runtime.files import sha256

MAX_REPORTED = 100  # pairs of ids with conflicting labels that the manifest lists
DIGEST_BYTES = 16  # two of PCam's 327,680 patches collide with a chance of 1e-28


class StoreWriter:
    """Writes patches to the folders of their splits.

    Exact duplicates are dropped, if this is asked for, and reported (`duplicates`). A thread hashes
    and writes a chunk while the caller reads the next one.
    """

    def __init__(self, folder: Path, rectify: bool, side: int, classes: int):
        """Starts an empty store in `folder`, which exists and is empty.

        Args:
            rectify: drop exact duplicates.
            side: of a patch, in pixels.
            classes: how many there are.
        """
        self.folder = folder
        self.side, self.classes = side, classes
        self.read_counts: Counter[str] = Counter()
        self._writers: dict[str, _SplitWriter] = {}
        self._duplicates = Duplicates(rectify)
        self._thread = ThreadPoolExecutor(1, "writer")
        self._written: Future | None = None  # the newest chunk

    def __enter__(self):
        """Returns this writer; at the end, its thread has ended."""
        return self

    def __exit__(self, *_: object) -> None:
        """Waits for the chunk that is being written, so that its folder can be removed."""
        self._thread.shutdown()

    def add(self, split: str, chunk: Chunk) -> None:
        """Writes those patches of `chunk` that are kept; the caller must not change it any more.

        It waits for the chunk before, and raises what was raised there. So memory holds two.
        """
        self._wait()
        self._written = self._thread.submit(self._write, split, chunk)

    def _wait(self) -> None:
        if self._written:
            self._written.result()

    def _write(self, split: str, chunk: Chunk) -> None:
        if split not in self._writers:
            folder, dtype = self.folder / split, label_dtype(self.classes)
            self._writers[split] = _SplitWriter(folder, (self.side, self.side, 3), dtype)
        self.read_counts[split] += len(chunk.labels)
        groups = [None] * len(chunk.labels) if chunk.groups is None else chunk.groups.tolist()
        for image, label, name, group in zip(*chunk[:3], groups, strict=True):
            digest = hashlib.sha256(image).digest()[:DIGEST_BYTES]
            if self._duplicates.keeps(digest, split, int(label), str(name)):
                self._writers[split].add(image, int(label), str(name), group, digest)

    def close(self, begin: Begin = silent) -> dict:
        """Completes the files and returns the part of the manifest that describes them.

        Args:
            begin: is called once, to show the progress of the checksums.

        Raises:
            UserError: train or valid holds no patch, a split of the source kept none, or two
                patches of a split have the same id.
        """
        self._wait()
        # Training does not need a test split.
        for split in dict.fromkeys(["train", "valid", *self._writers]):
            if split not in self._writers or not self._writers[split].labels:
                raise UserError(
                    f"config.data: no patch is left in the {split} split, out of "
                    f"{self.read_counts[split]} read; check the source, or set "
                    "config.data.rectify=False to keep duplicates"
                )
        have_groups = {len(writer.groups) for writer in self._writers.values()} != {0}
        for split, writer in self._writers.items():
            if have_groups and len(writer.groups) < len(writer.labels):
                raise UserError(
                    f"config.data: patches of {split} have no group, but others have; "
                    "give all of them one, or none"
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
                split: np.bincount(np.asarray(found, int), minlength=self.classes).tolist()
                for split, found in labels.items()
            },
            "groups": self._groups(),
            "duplicates": self._duplicates.summary(),
        }

    def _groups(self) -> dict[str, int] | None:
        """Returns how many groups each split has, and how many are in several; None without."""
        found = {split: set(writer.groups) for split, writer in self._writers.items()}
        if not any(found.values()):
            return None
        seen = Counter(group for groups in found.values() for group in groups)
        counts = {split: len(found.get(split, ())) for split in SPLITS}
        return counts | {"shared": sum(times > 1 for times in seen.values())}

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

    def __init__(self, folder: Path, shape: tuple[int, int, int], label_type: np.dtype):
        folder.mkdir()
        self.folder = folder
        self._shape, self._label_type = shape, label_type
        self.labels: list[int] = []
        self.groups: list[str] = []  # empty if the source knows none
        self.ids: list[str] = []
        self.samples: list[bytes] = []  # the digest of a patch's pixels, then its label
        self._images = open(folder / "images.npy", "wb")  # noqa: SIM115 (close() closes it)
        self._header_bytes = self._write_header()

    def add(
        self, image: np.ndarray, label: int, name: str, group: str | None, digest: bytes
    ) -> None:
        self._images.write(np.ascontiguousarray(image).data)
        self.labels.append(label)
        self.ids.append(name)
        self.samples.append(digest + label.to_bytes(self._label_type.itemsize, "little"))
        if group is not None:
            self.groups.append(group)

    def close(self) -> None:
        with self._images:
            self._images.seek(0)
            # NumPy pads its header for a first axis that grows, so the pixels stay in place.
            if self._write_header() != self._header_bytes:
                raise RuntimeError(f"{self._images.name}: header of {len(self.ids)} patches grew")
        np.save(self.folder / "labels.npy", np.asarray(self.labels, self._label_type))
        # Each id is as wide as the longest, 4 bytes per character, because an array of objects
        # would be a pickle.
        ids = np.asarray(self.ids, str)
        check_ids(ids, f"config.data: ids of {self.folder.name}")
        np.save(self.folder / "ids.npy", ids)
        if self.groups:
            np.save(self.folder / "groups.npy", np.asarray(self.groups, str))

    def _write_header(self) -> int:
        shape = (len(self.labels), *self._shape)
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._images, header)
        return self._images.tell()


class Duplicates:
    """Remembers every patch by a digest of its pixels; the first of equal patches stays.

    A patch whose label differs from that of the first equal patch is always counted and reported.
    """

    def __init__(self, rectify: bool):
        """Starts with no patch; with `rectify`, later duplicates are dropped."""
        self.rectify = rectify
        # One entry per patch takes a few hundred bytes of memory: digest -> split, label, id.
        self._first: dict[bytes, tuple[str, int, str]] = {}
        self._dropped_within: Counter[str] = Counter()
        self._dropped_across: Counter[str] = Counter()
        self._conflicts: list[list[str]] = []  # ids of the first patch and the later one

    def keeps(self, digest: bytes, split: str, label: int, name: str) -> bool:
        """Remembers a patch, counts it if it is dropped, and returns whether it stays."""
        if digest not in self._first:
            self._first[digest] = (split, label, name)
            return True
        first_split, first_label, first_name = self._first[digest]
        dropped = self._dropped_within if split == first_split else self._dropped_across
        # Without rectify nothing is dropped, but contradicting labels are still reported.
        dropped[split] += self.rectify
        if label != first_label:
            self._conflicts.append([first_name, name])
        return not self.rectify

    def summary(self) -> dict:
        """Returns what a manifest says of duplicates: counts by split, and conflicting labels."""
        return {
            "dropped_within": {split: self._dropped_within[split] for split in SPLITS},
            "dropped_across": {split: self._dropped_across[split] for split in SPLITS},
            "conflicting_labels": len(self._conflicts),
            "conflicts": self._conflicts[:MAX_REPORTED],
        }
