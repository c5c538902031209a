"""What the package shows, and what it stands on."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import cgroups
from cgroups import CgroupError, FormatError

PUBLIC = """
MAX BusyError Cgroup CgroupError CpuQuota Events ExistsError FormatError FrozenTimeoutError GoneError
IoMax LimitRefusedError Limits Max MemoryEvents Mount NotSupportedError Pressure PressureTrigger PressureWatch Stats
StatsPlan Throttled WaitTimeoutError Watch available_controllers delegated find_mount format_bytes own_directory
own_path parse_bytes parse_cpu read_all read_events read_stats read_throttled
"""
LAYERS = [
    {"errors"}, {"formats"}, {"files", "io_limits"},
    {"controllers", "devices", "directories", "events", "limits", "stats"},
    {"pressure", "processes", "throttling", "writing"}, {"group"}, {"tree"},
]  # fmt: skip


def sources() -> dict[str, ast.Module]:
    folder = Path(cgroups.__file__).parent
    return {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}


def imports(tree: ast.Module) -> tuple[set[str], set[str]]:
    """The top-level packages, and the modules of our own, that a module imports."""
    others: set[str] = set()
    ours: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            others.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            ours.update([node.module] if node.module else [alias.name for alias in node.names])
        elif isinstance(node, ast.ImportFrom) and node.module:
            others.add(node.module.partition(".")[0])
    return others, ours


def test_public_names_are_these() -> None:
    assert set(cgroups.__all__) == set(PUBLIC.split())
    assert len(cgroups.__all__) == len(set(cgroups.__all__))
    assert all(hasattr(cgroups, name) for name in cgroups.__all__)


def test_it_is_marked_as_typed() -> None:
    assert files("cgroups").joinpath("py.typed").is_file()


def test_it_needs_the_standard_library_only_and_logs_nothing() -> None:
    used = {name for tree in sources().values() for name in imports(tree)[0]}
    assert used <= sys.stdlib_module_names
    assert "logging" not in used
    assert "asyncio" not in used


def test_modules_import_only_those_below_them() -> None:
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    found = sources()
    assert set(found) == {*level, "__init__"}
    for name, tree in found.items():
        if name != "__init__":
            assert all(level[other] < level[name] for other in imports(tree)[1]), name


def test_importing_it_changes_nothing() -> None:
    code = "import sys, os, cgroups; print(os.listdir('/proc/self/fd').__len__(), 'logging' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    plain = subprocess.run(
        [sys.executable, "-c", "import os; print(len(os.listdir('/proc/self/fd')))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [plain.stdout.strip(), "False"]
    assert done.stderr == ""


def test_errors_show_their_remedy_and_carry_what_they_are_about() -> None:
    error = CgroupError("cannot x: y", remedy="do z", path="/a", value="v", errno=22)
    assert str(error) == "cannot x: y (do z)"
    assert (error.message, error.path, error.value, error.errno) == ("cannot x: y", "/a", "v", 22)
    assert str(CgroupError("cannot x: y")) == "cannot x: y"
    assert isinstance(FormatError("bad"), ValueError)


def test_every_error_is_a_cgroup_error() -> None:
    names = [name for name in cgroups.__all__ if name.endswith("Error")]
    assert len(names) == 9
    assert all(issubclass(getattr(cgroups, name), CgroupError) for name in names)
