"""The rooms of the project: who may import whom, how long a file may be, where jit may appear."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = ("ecmh_jax", "models", "experiments")
LONGEST_FILE = 400  # lines


def source_files(*rooms: str) -> list[pathlib.Path]:
    """Every Python file of the rooms."""
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def imported_modules(path: pathlib.Path) -> set[str]:
    """Full dotted names of what a file imports, wherever in the file, relative ones resolved.

    ``from a import b`` may import the module a.b or a name out of a: it counts as a.b.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def in_room(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def uses_of_jit(path: pathlib.Path) -> list[int]:
    """Lines that name ``jit`` or ``pjit``, as an attribute, an import or by itself."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        attribute = isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit")
        imported = isinstance(node, ast.alias) and node.name.split(".")[-1] in ("jit", "pjit")
        if attribute or imported:
            lines.append(node.lineno)
    return lines


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def test_there_is_something_to_look_at():
    assert len(source_files("ecmh_jax")) > 5
    assert len(source_files("models")) > 5
    assert "ecmh_jax.acceptance" in imported_modules(ROOT / "ecmh_jax" / "transition.py")
    assert uses_of_jit(ROOT / "ecmh_jax" / "compiled.py")


@pytest.mark.parametrize("path", source_files("ecmh_jax"), ids=name_of)
def test_library_knows_jax_and_itself_only(path):
    known = {"jax", "chex", "numpy", "ecmh_jax", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imported_modules(path)} <= known


@pytest.mark.parametrize("path", source_files("models"), ids=name_of)
def test_models_know_nothing_of_the_library_but_its_types(path):
    names = imported_modules(path)
    assert not [name for name in names if in_room(name, "experiments") or in_room(name, "tests")]
    from_library = {name for name in names if in_room(name, "ecmh_jax")}
    assert all(in_room(name, "ecmh_jax.base") for name in from_library)


@pytest.mark.parametrize("path", source_files("experiments"), ids=name_of)
def test_experiments_do_not_need_the_tests(path):
    assert not [name for name in imported_modules(path) if in_room(name, "tests")]


@pytest.mark.parametrize("path", source_files(*ROOMS), ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", source_files("ecmh_jax"), ids=name_of)
def test_jit_is_in_one_file(path):
    assert path.name == "compiled.py" or not uses_of_jit(path)
