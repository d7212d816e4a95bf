"""Files of a workdir that the program wrote itself, and that were then cut or edited."""

import json
import random
from pathlib import Path

import numpy as np

from bef_jax.ablation import ablate
from bef_jax.configs import quickstart
from bef_jax.data import near_duplicates
from bef_jax.errors import UserError
from bef_jax.models.weights import timm_config
from bef_jax.planning import benchmark_records
from bef_jax.scoring.loaded import ExportedModel
from bef_jax.scoring.metrics import Evaluation, binary_metrics
from bef_jax.scoring.probabilities_csv import read_probabilities, write_probabilities
from bef_jax.training import checkpoint, history
from bef_jax.training.outputs import read_train_summary

_BLOCK = {"split": "valid", "n": 3, "auc": None, "accuracy": 1, "loss": 0.5, "brier": 0.1, "ece": 0}
_CONTENTS = {
    "train_summary.json": {
        "mode": "train", "step": 6, "params": 9, "images_per_second": 1.5, "wall_seconds": 3.5,
        "best_step": 6, "valid": _BLOCK, "test": None,
    },
    "near_duplicates.json": {
        "version": 1, "content": "a0",
        "found": {"train/valid": {"patches": 1, "pairs": [["a", "b"]]}},
    },
    "benchmark_records.json": [{"timestamp": "2026-11-30", "summary": {"mode": "benchmark"}}],
    "export.json": {"classes": ["normal", "metastasis"], "mpp": 0.972, "files": {}},
    "weights/config.json": {
        "architecture": "efficientnet_b0", "model_args": {"bn_eps": 1e-3, "pad_type": "same"},
        "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2],
    },
    "checkpoints/6/metrics/metrics": {"valid_auc": 0.5},
}  # fmt: skip
# Values that an editor, or another program, could write.
_VALUES = [None, 3, -1, 1e400, float("nan"), "x", "", [], {}, [[]], True, 10**30, "\n\x1b[31m"]


def write(folder: Path, rng: random.Random) -> None:
    """Writes all these files, in many calls with a value changed or removed."""
    contents = json.loads(json.dumps(_CONTENTS))
    config = json.loads(quickstart.get_config().to_json_best_effort())
    contents |= {
        "config.json": config,
        "checkpoints/6/run/metadata": {"config": config, "clock": {}},
    }
    if rng.random() < 0.5:
        _edit(contents[rng.choice(sorted(contents))], rng)
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    lines = [{"step": step, "epoch": step / 3, "loss": 0.5} for step in range(1, 7)]
    if rng.random() < 0.3:
        _edit(lines[rng.randrange(6)], rng)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    probabilities, labels = np.array([0.1, 0.2, 0.9]), np.array([0, 0, 1], np.uint8)
    ids = np.array(["=a", "'=b", "c"])
    metrics = binary_metrics(probabilities, labels)
    evaluation = Evaluation("valid", ids, labels, probabilities, metrics)
    write_probabilities(folder / "scores_valid.csv", evaluation)


def _edit(content: dict | list, rng: random.Random) -> None:
    """Removes a value somewhere inside, or replaces it."""
    while True:
        keys = sorted(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(content[key], (dict, list)) and rng.random() < 0.7:
            content = content[key]
            continue
        if rng.random() < 0.3:
            del content[key]
        else:
            content[key] = rng.choice(_VALUES)
        return


def read(folder: Path) -> None:
    """Reads every file, also after another one was refused."""
    trial = ablate.Trial("baseline", 0, folder, quickstart.get_config(), {})
    exported = ExportedModel(folder / "model.stablehlo")
    readers = [
        lambda: read_train_summary(folder),
        trial.summary,
        lambda: ablate.check_unchanged(trial),
        lambda: _check_lines(history._read(folder / "metrics.jsonl")),
        lambda: near_duplicates._read(folder / "near_duplicates.json"),
        lambda: benchmark_records.read(folder / "benchmark_records.json"),
        lambda: (exported.classes, exported.mpp),
        lambda: timm_config.read(folder / "weights" / "model.safetensors"),
        lambda: checkpoint.read_config(folder / "checkpoints" / "6"),
        lambda: checkpoint.best(folder),
        lambda: read_probabilities(folder / "scores_valid.csv", "run again"),
    ]
    errors = [error for error in map(_refusal, readers) if error]
    if errors:
        raise UserError(" | ".join(map(str, errors)))


def _refusal(reader) -> UserError | None:
    try:
        reader()
    except UserError as error:
        return error
    return None


def _check_lines(lines: list[dict]) -> None:
    assert all(isinstance(line["step"], int) for line in lines)
