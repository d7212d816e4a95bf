"""Pieces of a report's page. All text in them is escaped."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

Columns = Mapping[str, tuple[str, str]]  # for each key of a summary: its name, and its format


def table(rows: Iterable[list[Any]]) -> str:
    """Returns a table whose first row is the head; every cell is escaped."""
    head, *body = rows
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in body)
    names = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    # The table has a box that scrolls, so that on a phone the whole page need not scroll sideways.
    return (
        f"<div class=scroll><table><thead><tr>{names}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def section(title: str, rows: list[list[Any]]) -> str:
    """Returns a section with a table of names and values; a long one is folded."""
    content = table([["", ""], *rows])
    if len(rows) > 20:  # such as a whole configuration
        content = f"<details><summary>{len(rows)} entries</summary>{content}</details>"
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def picture(description: str, light: str, dark: str) -> str:
    """Returns a plot, from the data: addresses for light and for dark screens."""
    # Only screens get the dark picture. Paper gets the light one, even if the system prefers dark.
    alt = escape(description, quote=True)
    return (
        f'<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{alt}" src="{light}"></picture>'
    )


def data_uri(content: bytes, kind: str = "png") -> str:
    """Returns the address that holds a picture itself, so that a page needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def block_of(summary: Mapping[str, Any], split: str) -> dict[str, Any]:
    """Returns the block of a summary that describes a split; empty if there is none."""
    block = summary.get(split)
    return dict(block) if isinstance(block, Mapping) else {}


def figure(block: Mapping[str, Any], key: str, number_format: str) -> str:
    """Returns a figure of a block, with its interval if there is one; a dash if it is not there."""
    value = block.get(key)
    if value is None:
        return "-"
    # The interval of the AUC has its own, stable key. The other intervals are all in ci95.
    interval = block.get(f"{key}_ci95") or (block.get("ci95") or {}).get(key)
    text = number_format.format(value)
    if interval:
        low, high = (number_format.format(end) for end in interval)
        text += f" ({low} to {high})"
    return text
