"""Finds exact duplicates: patches whose pixels came before, in any split."""

from collections import Counter

from bef_jax.data.patch import SPLITS

MAX_REPORTED = 100  # pairs of ids with conflicting labels that the manifest lists


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
