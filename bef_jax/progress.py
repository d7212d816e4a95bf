"""Where training stands, on stderr: a live bar on a terminal, a line now and then elsewhere."""

from datetime import timedelta
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

# Short enough for a terminal of 80 columns: the AUC is of valid, the wait is for input.
FORMATS = {
    "loss": "loss {:.3f}",
    "valid_auc": "AUC {:.4f}",
    "images_per_second": "{:,.0f} images/s",
    "input_wait_fraction": "wait {:.0%}",
}


class Progress:
    """A context manager that shows the step, the latest figures and the time left."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        line_seconds: float = 10.0,
    ):
        """Sets up the display; nothing is shown before the first update.

        Args:
            total_steps: of the whole run.
            start_step: the step that a resumed run starts from.
            console: where to show; stderr unless told.
            line_seconds: least time between two lines, where there is no terminal.
        """
        self._total = total_steps
        self._console = console or Console(stderr=True)
        self._line_seconds = line_seconds
        self._figures: dict[str, float] = {}
        self._first: tuple[int, float] | None = None
        self._next_line = 0.0
        # The summary is the only thing on stdout, so it must not be caught by the display.
        self._bar = RichProgress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
            # In a file or a pipe the bar would be a heap of control characters.
            disable=not self._console.is_interactive,
            redirect_stdout=False,
            # rich draws in a thread of its own, which takes the GIL from the loop: ten times, by
            # default.
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, figures="")

    def __enter__(self) -> "Progress":
        """Starts the live display, if there is a terminal."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the display and gives the cursor back."""
        self._bar.stop()

    def update(self, step: int, **figures: float | None) -> None:
        """Shows `step` and the figures named in FORMATS; one that is not given keeps its value.

        Args:
            step: steps done, of total_steps.
            **figures: loss, valid_auc, images_per_second, input_wait_fraction; None is left out.
        """
        self._figures |= {name: value for name, value in figures.items() if value is not None}
        now = monotonic()
        # The clock starts at the first update: compilation says nothing about the time left.
        self._first = self._first or (step, now)
        text = self._describe(step, now)
        self._bar.update(self._task, completed=step, figures=text)
        # The last step's line always, since a run's end is what a log is read for.
        if self._bar.disable and (now >= self._next_line or step == self._total):
            self._next_line = now + self._line_seconds
            self.log(f"step {step:,}/{self._total:,}  {text}")

    def log(self, text: str) -> None:
        """Prints `text` on a line of its own, above the bar."""
        # Plain: brackets in a path would be taken for markup.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _describe(self, step: int, now: float) -> str:
        shown = [form.format(self._figures[k]) for k, form in FORMATS.items() if k in self._figures]
        first_step, first_time = self._first
        if step > first_step:
            # Of this start alone: a resumed run may be on other hardware.
            seconds = (now - first_time) / (step - first_step) * (self._total - step)
            shown.append(f"{timedelta(seconds=round(seconds))} left")
        return "  ".join(shown)
