"""The report of a run for people: one page that contains its pictures and works offline."""

from bef_jax.report.gather import report_run
from bef_jax.report.write import Content, write_report

__all__ = ["Content", "report_run", "write_report"]
