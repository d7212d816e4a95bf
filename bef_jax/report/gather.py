"""Gathers the content of the report of a training run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from bef_jax.config import flatten
from bef_jax.data import store
from bef_jax.data.card import data_card
from bef_jax.data.store import Split
from bef_jax.report.write import Content, write_report
from bef_jax.runtime import devices
from bef_jax.runtime.versions import installed_versions
from bef_jax.scoring.gradcam import make_explainer
from bef_jax.scoring.metrics import Evaluation


def report_run(
    workdir: Path,
    config: ConfigDict,
    splits: Mapping[str, Split],
    manifest: Mapping[str, Any],
    history: list[dict[str, Any]],
    evaluations: Mapping[str, Evaluation],
    variables: dict,
    summary: Mapping[str, Any],
) -> Path:
    """Writes <workdir>/report and returns its page.

    Args:
        splits: the splits of the run's store, by name.
        manifest: the store's manifest. It is not read again, because the file may be gone by now.
        history: the lines of metrics.jsonl.
        evaluations: of the best checkpoint, by split.
        variables: {params, batch_stats} of the best checkpoint.
        summary: the summary of the run.
    """
    environment = [*installed_versions().items(), ("device", devices.describe())]
    content = Content(
        history=history,
        evaluations=evaluations,
        # The gallery reads only the patches that it shows.
        images={name: splits[name].images for name in evaluations},
        summary=summary,
        tables={
            "Data": data_card(store.store_path(config.data), manifest, splits),
            "Environment": list(map(list, environment)),
            # repr shows a difference between '' and None.
            "Configuration": [[name, repr(value)] for name, value in flatten(config).items()],
        },
        explain=make_explainer(config, variables),
        center=config.rcc.center,
    )
    return write_report(workdir / "report", content)
