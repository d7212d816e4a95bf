"""The progress of long work, on stderr: a live bar on a terminal, else a line now and then.

`Progress` is for the one loop of training, `Phases` is for data, read piece by piece, and `Slides`
is for predict.
"""

from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

# Short, to fit a terminal of 80 columns: AUC is the AUC on valid, wait is the wait for input.
FORMATS = {
    "loss": "loss {:.3f}",
    "valid_auc": "AUC {:.4f}",
    "images_per_second": "{:,.0f} images/s",
    "input_wait_fraction": "wait {:.0%}",
}


_LONGEST_NAME = 28  # characters of a slide's name that a terminal of 80 columns has room for


class _Display:
    """A context manager with a bar from rich, or with lines that replace it."""

    def __init__(self, console: Console | None, line_seconds: float, *columns: ProgressColumn):
        self._console = console or Console(stderr=True)
        self._line_seconds = line_seconds
        self._next_line = 0.0
        # stdout has only the summary, so the display must not catch it.
        self._bar = RichProgress(
            *columns,
            console=self._console,
            # In a file or a pipe the bar would be many control characters.
            disable=not self._console.is_interactive,
            redirect_stdout=False,
            # rich draws in its own thread, which takes the GIL from the loop. Its default is ten
            # times a second.
            refresh_per_second=2,
        )

    def __enter__(self):
        """Starts the live display, if there is a terminal."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops the display and shows the cursor again."""
        self._bar.stop()

    def log(self, text: str) -> None:
        """Prints `text` on its own line, above the bar."""
        # Turn markup off, because rich would read brackets in a path as markup.
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, text: str, now: float, is_last: bool) -> None:
        """Prints `text` if there is no bar, and it is time for a line or this is the last one."""
        if self._bar.disable and (now >= self._next_line or is_last):
            self._next_line = now + self._line_seconds
            self.log(text)


class _Pace:
    """The speed of work since the first call of `rate` or `left`."""

    def __init__(self, total: float):
        self.total = total
        self._first: tuple[float, float] | None = None

    def rate(self, done: float, now: float) -> float | None:
        """Returns how much is done in a second; None if it is too early to know."""
        # Earlier work, such as compilation, says nothing about the time left.
        self._first = self._first or (done, now)
        first_done, first_time = self._first
        is_known = done > first_done and now > first_time
        return (done - first_done) / (now - first_time) if is_known else None

    def left(self, done: float, now: float) -> str | None:
        """Returns the time left in words; None if it is too early to know."""
        rate = self.rate(done, now)
        return f"{timedelta(seconds=round((self.total - done) / rate))} left" if rate else None


class Progress(_Display):
    """Shows a training run: the step, the latest figures, such as the loss, and the time left.

    It is a context manager with one bar, whose length is known from the start.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: Console | None = None,
        line_seconds: float = 10.0,
    ):
        """Sets up the display; nothing is shown before the first update.

        Args:
            total_steps: the steps of the whole run.
            start_step: the step that a resumed run starts from.
            console: where to show it; stderr by default.
            line_seconds: the least time between two lines, if there is no terminal.
        """
        super().__init__(
            console,
            line_seconds,
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
        )
        self._total = total_steps
        self._figures: dict[str, float] = {}
        # Measure only this start, because a resumed run may be on other hardware.
        self._pace = _Pace(total_steps)
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, figures="")

    def update(self, step: int, **figures: float | None) -> None:
        """Shows `step` and the figures named in FORMATS; one that is not given stays as it was.

        Args:
            step: steps done, of total_steps.
            **figures: loss, valid_auc, images_per_second, input_wait_fraction; None is left out.
        """
        self._figures |= {name: value for name, value in figures.items() if value is not None}
        now = monotonic()
        text = self._describe(step, now)
        self._bar.update(self._task, completed=step, figures=text)
        # Always print the last step's line, because a log is read for the end of the run.
        self._line(f"step {step:,}/{self._total:,}  {text}", now, is_last=step == self._total)

    def _describe(self, step: int, now: float) -> str:
        shown = [form.format(self._figures[k]) for k, form in FORMATS.items() if k in self._figures]
        left = self._pace.left(step, now)
        return "  ".join([*shown, left] if left else shown)


class Phases(_Display):
    """Shows work that is done in pieces, such as reading a split: how much is done, and how fast.

    It is a context manager with a bar for each piece. A piece says how long it is when it begins.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = 10.0):
        """Sets up the display; nothing is shown before the first piece begins.

        Args:
            console: where to show it; stderr by default.
            line_seconds: the least time between two lines of a piece, if there is no terminal.
        """
        name, figures = TextColumn("{task.description}", markup=False), "{task.fields[figures]}"
        super().__init__(console, line_seconds, name, BarColumn(bar_width=12), TextColumn(figures))

    def begin(self, name: str, total: int, unit: str) -> Callable[[int], None]:
        """Shows a new piece of work; returns a function to call with the amount of new work done.

        Args:
            name: the work, in words for a reader.
            total: the amount of work, in units.
            unit: "patches", "slides" or "bytes".
        """
        task = self._bar.add_task(name, total=total, figures="")
        done, start, pace = 0, monotonic(), _Pace(total)

        def advance(amount: int) -> None:
            nonlocal done
            done, now = done + amount, monotonic()
            figures = _figures(done, total, unit, pace, now, start)
            self._bar.update(task, completed=done, figures=figures)
            self._line(f"{name}: {figures}", now, is_last=done >= total)

        return advance


class Slides(_Display):
    """Shows how far the slides of an input are scored: the present one, and all together.

    It is a context manager with two bars. Amounts are areas, in tiles.
    """

    def __init__(
        self, count: int, tiles: float, console: Console | None = None, line_seconds: float = 10.0
    ):
        """Sets up the display; nothing is shown before the first slide begins.

        Args:
            count: the number of slides.
            tiles: the area of all slides.
            console: where to show it; stderr by default.
            line_seconds: the least time between two lines, if there is no terminal.
        """
        name, figures = TextColumn("{task.description}", markup=False), "{task.fields[figures]}"
        super().__init__(console, line_seconds, name, BarColumn(bar_width=12), TextColumn(figures))
        self._count, self._number = count, 0
        self._name, self._of_slide, self._in_slide = "", 0.0, 0.0
        self._done, self._pace = 0.0, _Pace(tiles)
        # The second bar is drawn below the first, and stays where it is.
        self._tasks = [self._bar.add_task(name, total=None, figures="") for name in ("", "slides")]

    def begin(self, name: str, tiles: float) -> None:
        """Begins the next slide; what is left of the one before it is not scored.

        Args:
            name: of the slide.
            tiles: its area.
        """
        self.saved(self._of_slide - self._in_slide)
        self._name, self._of_slide, self._in_slide = name, tiles, 0.0
        self._number += 1

    @property
    def place(self) -> str:
        """Returns which slide it is, such as "slide 3 of 40"."""
        return f"slide {self._number:,} of {self._count:,}"

    def saved(self, tiles: float) -> None:
        """Shows that an earlier run scored an area of the slide."""
        # Count it as no work, because it says nothing about the speed of this run.
        self._in_slide += tiles
        self._pace.total -= tiles

    def advance(self, tiles: float) -> None:
        """Shows that a further area of the slide was scored."""
        self._in_slide += tiles
        self._done += tiles
        now = monotonic()
        slide, folder = self._describe(now)
        self._bar.update(
            self._tasks[0], description=self._name[-_LONGEST_NAME:], figures=slide,
            completed=self._in_slide, total=self._of_slide,
        )  # fmt: skip
        self._bar.update(
            self._tasks[1], figures=folder, completed=self._done, total=self._pace.total
        )
        is_last = self._number == self._count and self._in_slide > self._of_slide - 0.5
        self._line(f"{self._name}: {slide}; slide {folder}", now, is_last)

    def _describe(self, now: float) -> tuple[str, str]:
        """Returns what is said of the slide and of the folder."""
        rate = self._pace.rate(self._done, now)
        slide = f"{self._in_slide:,.0f}/{self._of_slide:,.0f} tiles"
        folder = f"{self._number:,}/{self._count:,}"
        if not rate:
            return slide, folder
        left = (self._of_slide - self._in_slide, self._pace.total - self._done)
        of_slide, of_folder = (timedelta(seconds=round(max(0.0, x) / rate)) for x in left)
        return f"{slide}  {rate:,.0f}/s  {of_slide} left", f"{folder}  {of_folder} left"


def _figures(done: int, total: int, unit: str, pace: _Pace, now: float, start: float) -> str:
    scale, unit = (1e6, "MB") if unit == "bytes" else (1, unit)
    rate = pace.rate(done, now)
    shown = [f"{done / scale:,.0f}/{total / scale:,.0f} {unit}"]
    if rate:
        shown.append(f"{rate / scale:,.0f}/s")
    end = f"in {timedelta(seconds=round(now - start))}" if done >= total else pace.left(done, now)
    return "  ".join([*shown, end] if end else shown)
