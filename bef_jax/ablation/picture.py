"""The ablation table as a picture."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure


def draw(
    table: Mapping[str, Any], aucs: Mapping[str, list[float]], titles: Mapping[str, str]
) -> Figure:
    """Draws the AUC of every trial, and each row's mean with its standard deviation.

    Args:
        table: as `table.tabulate` returns it.
        aucs: {row: AUCs of its trials}.
        titles: {row: its name for people}.
    """
    # Reverse the rows, because matplotlib counts upwards and the first row should be on top.
    names = list(reversed(table["rows"]))
    # Without pyplot there is no global state and no display. Every row adds the same height.
    figure = Figure((8, 1.2 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(names):
        row = table["rows"][name]
        # Okabe and Ito's colours, as in the report: colour-blind people can tell them apart.
        axes.plot(aucs[name], [height] * len(aucs[name]), "o", color="#0072B2", alpha=0.6)
        if row["auc"] is not None:
            bar = {"fmt": "|", "color": "#D55E00", "markersize": 18, "capsize": 4}
            axes.errorbar(row["auc"], height, xerr=row["auc_std"] or 0, **bar)
    axes.set_yticks(range(len(names)), [titles.get(name, name) for name in names])
    axes.set_xlabel(f"AUC of {table['split']}; dot: one run, bar: mean and standard deviation")
    axes.grid(axis="x", color="#d8dee4")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure
