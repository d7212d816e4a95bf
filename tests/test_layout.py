"""Checks which folder of the package may import which, as docs/architecture.md draws it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bef_jax"

# Lowest first. A module imports from its own floor and from those below it. A room is a folder of
# the package, or a single module. If several names fit a module, the longest one decides.
FLOORS = (
    {"errors", "configs", "runtime", "hub", "data.patch", "data.pictures"},
    {"slides.readers"}
    | {f"slides.{name}" for name in ("reader", "tissue", "tiles", "blocks", "annotations")},
    {"data"},
    {"models"},
    {"config"},
    {"training"},
    {"scoring"},
    {"slides", "report", "export", "ablation", "planning"},
    {"train", "evaluate", "predict"},
    {"cli", "main", "__main__"},
)
FULL = 13  # the most modules that one folder may have


def names_of(path):
    """Returns the dotted name of a module below the package: '' is the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {names_of(path): path for path in PACKAGE.rglob("*.py")}
# The folder configs/ is installed as bef_jax.configs.
MODULES |= {f"configs.{path.stem}": path for path in (ROOT / "configs").glob("*.py")}


def imported(path):
    """Yields the modules of the package that a file imports, also those in functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relative to its place"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            package, _, name = module.partition(".")
            if package == "bef_jax":
                # A name that is no module is exported by the module before it.
                yield name if name in MODULES else name.rpartition(".")[0]


def room_of(module):
    """Returns the longest name in FLOORS that a module has, or lies in."""
    rooms = [room for floor in FLOORS for room in floor]
    return max((room for room in rooms if f"{module}.".startswith(f"{room}.")), key=len)


def floor_of(module):
    return next(number for number, floor in enumerate(FLOORS) if room_of(module) in floor)


IMPORTS = {module: set(imported(path)) - {""} for module, path in MODULES.items() if module}


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_no_module_imports_from_a_floor_above(module):
    above = {other for other in IMPORTS[module] if floor_of(other) > floor_of(module)}
    assert not above


def test_rooms_import_each_other_in_no_circle():
    """If a room imports another one, that one never leads back to it."""
    imports = {}
    for module, others in IMPORTS.items():
        imports.setdefault(room_of(module), set()).update(map(room_of, others))
    while imports:
        # Remove the rooms that import no other remaining one, until none remains.
        free = {room for room, others in imports.items() if not others & imports.keys() - {room}}
        assert free, imports
        imports = {room: others for room, others in imports.items() if room not in free}


def test_modes_do_not_import_each_other():
    modes = {"train", "evaluate", "predict"}
    assert not {mode: IMPORTS[mode] & modes for mode in modes if IMPORTS[mode] & modes}


def test_no_folder_is_too_full():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    counts = {folder: len([*folder.glob("[!_]*.py")]) for folder in folders}
    assert max(counts.values()) <= FULL, counts


def test_every_folder_says_what_it_is_for():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
