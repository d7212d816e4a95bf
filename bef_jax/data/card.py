"""The data card: what a reader should know about the patches before believing a score."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bef_jax.data import near_duplicates
from bef_jax.data.store import Split

# For each source: whether its splits share slides, and what a score then means.
_NONE_SHARED = "no: PCam's splits share no slide"
_SLIDES = {
    "pcam_hdf5": _NONE_SHARED,
    "tfds": _NONE_SHARED,
    "rpcam": "yes: the split is random, so patches of one slide are on both sides; a score is "
    "higher than on new slides, and cannot be compared with one on PCam",
    "npz": "not known: it depends on the files; if yes, a score is higher than on new slides",
    "synthetic": "there are no slides: the patches are drawn; a score says nothing about tissue",
}
_PCAM = "published scores on PCam, and not with those on RPCam, whose split shares slides"
_SAME = "runs on the same files, and not with published scores"
_COMPARABLE = {
    "pcam_hdf5": _PCAM,
    "tfds": _PCAM,
    "rpcam": "scores on random splits of RPCam, of which this is one, and not with those on PCam",
    "npz": _SAME,
    "synthetic": "runs on the same synthetic patches",
}
# The counts of TFDS's patch_camelyon 2.0.0, before duplicates are dropped.
_PCAM_COUNTS = {"train": 262_144, "valid": 32_768, "test": 32_768}


def data_card(
    folder: Path, manifest: Mapping[str, Any], splits: Mapping[str, Split]
) -> list[list[str]]:
    """Returns rows of name and value that describe a store and its splits."""
    source, duplicates = manifest["source"], manifest["duplicates"]
    rows = [["source", source], ["do splits share slides?", _SLIDES[source]]]
    rows.append(["a score can be compared with", _comparable(manifest)])
    for name, (negative, positive) in manifest["class_counts"].items():
        # A source may have no test split.
        if negative + positive:
            rows.append([name, f"{negative:,} normal, {positive:,} with metastasis"])
    rows.append(["exact duplicates dropped", _dropped(duplicates)])
    # This takes some 10 s for all of PCam, in addition to reading it. The store keeps the result,
    # so that it is needed only once.
    found = near_duplicates.across_splits(splits, folder, manifest["content"]["total"])
    for pair, near in found.items():
        first, second = pair.split("/")
        share = near["patches"] / len(splits[second])
        text = f"{near['patches']:,} ({share:.1%}) of {second}, turned or not"
        rows.append([f"near duplicates, {second} and {first}", text])
    return rows


def _comparable(manifest: Mapping[str, Any]) -> str:
    comparable = _COMPARABLE[manifest["source"]]
    if comparable is not _PCAM:
        return comparable
    # Published scores are on all of PCam. It still counts as whole when duplicates are dropped.
    missing = [name for name in _PCAM_COUNTS if _read_count(manifest, name) < _PCAM_COUNTS[name]]
    if not missing:
        return comparable
    counts = (
        f"{_read_count(manifest, name):,} of {_PCAM_COUNTS[name]:,} {name}" for name in missing
    )
    return f"{_SAME}: this is a part of PCam, {', '.join(counts)} patches"


def _read_count(manifest: Mapping[str, Any], split: str) -> int:
    """Returns how many patches a split had before duplicates were dropped."""
    dropped = manifest["duplicates"]
    where = ("dropped_within", "dropped_across")
    return manifest["counts"][split] + sum(dropped[key][split] for key in where)


def _dropped(duplicates: Mapping[str, Any]) -> str:
    within, across = (
        sum(duplicates[f"dropped_{where}"].values()) for where in ("within", "across")
    )
    contradicting = duplicates["conflicting_labels"]
    return (
        f"{within:,} within splits, {across:,} across; {contradicting:,} had contradicting labels"
    )
