"""The ablation table as a picture."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure


def draw(
    table: Mapping[str, Any], aucs: Mapping[str, list[float]], titles: Mapping[str, str]
) -> Figure:
    """AUC of every run, and each row's mean with its standard deviation.

    Args:
        table: as `ablation_table.tabulate` makes it.
        aucs: by row, of its runs.
        titles: by row, as people read them.
    """
    # matplotlib counts upwards: reversed, the table's first row is on top.
    names = list(reversed(table["rows"]))
    # No pyplot: no global state, no display. A row is as high, however many there are.
    figure = Figure((8, 1.2 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(names):
        row = table["rows"][name]
        # As in the report, Okabe and Ito's colours, which the colour-blind tell apart.
        axes.plot(aucs[name], [height] * len(aucs[name]), "o", color="#0072B2", alpha=0.6)
        if row["auc"] is not None:
            bar = {"fmt": "|", "color": "#D55E00", "markersize": 18, "capsize": 4}
            axes.errorbar(row["auc"], height, xerr=row["auc_std"] or 0, **bar)
    axes.set_yticks(range(len(names)), [titles.get(name, name) for name in names])
    axes.set_xlabel(f"AUC of {table['split']}; a dot is a run, a bar the mean and its deviation")
    axes.grid(axis="x", color="#d8dee4")
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure
