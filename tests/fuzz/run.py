"""One input after another: made, damaged, read, and judged."""

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

from bef_jax.errors import UserError
from tests.fuzz import mutate
from tests.fuzz.entries import ENTRIES

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 20  # that one input may take, on a machine that others share
GIB = 1 << 30


def try_seed(entry: str, seed: int, keep: Path | None = None) -> tuple[str, str]:
    """Makes the input of a seed, damages and reads it.

    Returns:
        accepted, refused or failed; and what was done and said.
    """
    rng = random.Random(f"{entry} {seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "input"
        folder.mkdir()
        ENTRIES[entry].make(folder, rng)
        done = mutate.damage(folder, rng) if rng.random() < 0.8 else "undamaged"
        outcome, said = judge(entry, folder)
        if outcome == "failed" and keep:
            shutil.copytree(folder, keep / entry / str(seed), dirs_exist_ok=True)
    return outcome, f"{entry} {seed}: {done}: {said}"


def judge(entry: str, folder: Path) -> tuple[str, str]:
    """Reads an input that is there; a refusal is one line, and the input stays as it was."""
    before = _digest(folder)
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ENTRIES[entry].read(folder)
        outcome, said = "accepted", ""
    except UserError as error:
        outcome, said = "refused", str(error)
    except BaseException:
        outcome, said = "failed", traceback.format_exc()
    if outcome == "refused" and (not said.strip() or "\n" in said):
        outcome, said = "failed", f"not one line: {said!r}"
    if _digest(folder) != before:
        outcome, said = "failed", f"the input was changed; {said}"
    return outcome, said


def limit_memory(bytes_more: int = 2 * GIB) -> None:
    """Lets the process map that much more than now; an allocation beyond it is a MemoryError."""
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
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()
