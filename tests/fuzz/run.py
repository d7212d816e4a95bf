"""Makes, damages, reads and judges one input after another."""

import contextlib
import hashlib
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from bef_jax.errors import UserError
from tests.fuzz import mutate
from tests.fuzz.entries import ENTRIES
from tests.memory import begin_peak, peak

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 20  # the limit for one input, on a shared machine
GIB = 1 << 30


class Verdict(NamedTuple):
    """The result of one input.

    Attributes:
        outcome: accepted, refused or failed.
        said: what was done to the input, and the error or complaint about it.
        peak: bytes of memory above what the process held before.
    """

    outcome: str
    said: str
    peak: int


def try_seed(entry: str, seed: int, keep: Path | None = None) -> Verdict:
    """Makes, damages and reads the input of a seed; an input that fails is kept under `keep`."""
    rng = random.Random(f"{entry} {seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "input"
        folder.mkdir()
        ENTRIES[entry].make(folder, rng)
        done = mutate.damage(folder, rng) if rng.random() < 0.8 else "undamaged"
        verdict = judge(entry, folder)
        if verdict.outcome == "failed" and keep:
            _keep(folder, keep / entry / str(seed))
    return verdict._replace(said=f"{entry} {seed}: {done}: {verdict.said}")


def _keep(folder: Path, place: Path) -> None:
    # Skip special files, which can't be copied; the seed makes them again.
    special = {path.name for path in folder.rglob("*") if not (path.is_file() or path.is_dir())}
    shutil.copytree(folder, place, dirs_exist_ok=True, ignore=lambda *_: special)


def judge(entry: str, folder: Path) -> Verdict:
    """Reads an input and judges it: a refusal must be one line, and the input must not change."""
    before, held = _digest(folder), begin_peak()
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ENTRIES[entry].read(folder)
        outcome, said = "accepted", ""
    except UserError as error:
        outcome, said = "refused", str(error)
    except BaseException:
        outcome, said = "failed", traceback.format_exc()
    grown = peak() - held
    if outcome == "refused" and (not said.strip() or not said.isprintable()):
        outcome, said = "failed", f"not one line that a terminal may show: {said!r}"
    if grown > GIB:
        outcome, said = "failed", f"it takes {grown / GIB:.1f} GiB; {said}"
    if _digest(folder) != before:
        outcome, said = "failed", f"the input was changed; {said}"
    return Verdict(outcome, said, grown)


def limit_memory(bytes_more: int = 4 * GIB) -> None:
    """Lets the process map `bytes_more` more than now; a larger allocation is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + bytes_more, resource.RLIM_INFINITY)
    )


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"it hangs: more than {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape"))
        digest.update(path.read_bytes() if path.is_file() else str(path.lstat().st_mode).encode())
    return digest.hexdigest()
