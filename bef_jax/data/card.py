"""The data card: what a reader should know about the patches before believing a score."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bef_jax.data import near_duplicates, sources
from bef_jax.data.patch import PCAM_CLASSES, SPLITS
from bef_jax.data.sources.description import ONLY_SAME_FILES, Description
from bef_jax.data.store import Split

_MOST_LISTED = 30  # classes whose counts are listed one by one


def data_card(
    folder: Path, manifest: Mapping[str, Any], splits: Mapping[str, Split]
) -> list[list[str]]:
    """Returns rows of name and value that describe a store and its splits."""
    source, duplicates = manifest["source"], manifest["duplicates"]
    description = sources.describe(source)
    rows = [["source", source], ["do splits share slides?", _shared(manifest, description)]]
    rows.append(["a score can be compared with", _comparable(manifest, description)])
    rows.append(["scale", f"{mpp} um per pixel" if (mpp := manifest["mpp"]) else "not known"])
    for name, counts in manifest["class_counts"].items():
        # A source may have no test split.
        if sum(counts):
            rows.append([name, _class_counts(manifest["classes"], counts)])
    rows.append(["exact duplicates dropped", _dropped(duplicates)])
    found = near_duplicates.across_splits(splits, folder, manifest["content"]["total"])
    for pair, near in found.items():
        first, second = pair.split("/")
        share = near["patches"] / len(splits[second])
        text = f"{near['patches']:,} ({share:.1%}) of {second}, turned or not"
        rows.append([f"near duplicates, {second} and {first}", text])
    return rows


def _shared(manifest: Mapping[str, Any], description: Description) -> str:
    """Returns whether the splits share slides or patients: by their groups, if these are known."""
    groups = manifest["groups"]
    if groups is None:
        return description.shared_slides
    if groups["shared"]:
        return (
            f"yes: {groups['shared']:,} groups are in several splits; "
            "a score is higher than on new slides"
        )
    counts = ", ".join(f"{groups[name]:,} of {name}" for name in SPLITS if groups[name])
    return f"no: each group is in one split ({counts})"


def _class_counts(classes: Sequence[str], counts: Sequence[int]) -> str:
    if tuple(classes) == PCAM_CLASSES:
        return f"{counts[0]:,} normal, {counts[1]:,} with metastasis"
    if len(classes) > _MOST_LISTED:
        there = sum(n > 0 for n in counts)
        return f"{sum(counts):,} of {there:,} classes, {min(counts):,} to {max(counts):,} of each"
    return ", ".join(f"{n:,} {name}" for n, name in zip(counts, classes, strict=True))


def _comparable(manifest: Mapping[str, Any], description: Description) -> str:
    # Published scores are on all of PCam. It still counts as whole when duplicates are dropped.
    whole = description.pcam_counts
    missing = [name for name in whole if _read_count(manifest, name) < whole[name]]
    if not missing:
        return description.comparable
    counts = (f"{_read_count(manifest, name):,} of {whole[name]:,} {name}" for name in missing)
    return f"{ONLY_SAME_FILES}: this is a part of PCam, {', '.join(counts)} patches"


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
