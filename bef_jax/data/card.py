"""What a reader should know of the patches before believing a score on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bef_jax.data import near_duplicates
from bef_jax.data.store import Split

# By source: whether splits share slides, and what a score then says.
_NONE_SHARED = "no: PCam's splits share no slide"
_SLIDES = {
    "pcam_hdf5": _NONE_SHARED,
    "tfds": _NONE_SHARED,
    "rpcam": "yes: the split is random, so patches of one slide are on both sides; a score is "
    "above what new slides give, and not to be compared with one on PCam",
    "npz": "not known: who made the files decided; if yes, a score is above what new slides give",
    "synthetic": "there are no slides: the patches are drawn, and a score says nothing of tissue",
}


def data_card(
    folder: Path, manifest: Mapping[str, Any], splits: Mapping[str, Split]
) -> list[list[str]]:
    """Rows of name and value, of a store and its splits."""
    source, duplicates = manifest["source"], manifest["duplicates"]
    rows = [["source", source], ["do splits share slides?", _SLIDES[source]]]
    for name, (negative, positive) in manifest["class_counts"].items():
        if negative + positive:
            rows.append([name, f"{negative:,} normal, {positive:,} with metastasis"])
    rows.append(["exact duplicates dropped", _dropped(duplicates)])
    for name, count in near_duplicates.count(folder, dict(splits)).items():
        share = count / len(splits[name])
        text = f"{count:,} ({share:.1%}) look like a patch of train (difference hash, eight views)"
        rows.append([f"near duplicates, {name}", text])
    return rows


def _dropped(duplicates: Mapping[str, Any]) -> str:
    within, across = (
        sum(duplicates[f"dropped_{where}"].values()) for where in ("within", "across")
    )
    contradicting = duplicates["conflicting_labels"]
    return (
        f"{within:,} within splits, {across:,} across; {contradicting:,} had contradicting labels"
    )
