"""What the package shows, and that showing it changes nothing."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pactown_runner
from pactown_runner import errors

PUBLIC = {
    *("IsolatedUser", "IsolationReport", "Limits", "LogRecord", "Outcome", "RunnerError"),
    *("Sandbox", "SandboxSpec", "Settings", "State", "Stats", "Supervisor"),
}

MODULES = [
    info.name
    for info in pkgutil.walk_packages(pactown_runner.__path__, "pactown_runner.")
    # What is `inside` is a program that runs as a tenant, not a module for others.
    if not info.name.endswith("__main__") and ".cli" not in info.name and ".inside" not in info.name
]

LOOK = """
import json, logging, os, sys, threading
before = (os.environ.copy(), os.umask(0o22), logging.root.level, list(logging.root.handlers), set(os.listdir(".")))
written = []
def watch(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.remove", "socket.bind", "subprocess.Popen", "os.fork"):
        written.append([event, str(arguments)])
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        written.append([event, str(arguments)])
sys.dont_write_bytecode = True
sys.addaudithook(watch)
import pactown_runner, importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
after = (os.environ.copy(), os.umask(0o22), logging.root.level, list(logging.root.handlers), set(os.listdir(".")))
print(json.dumps({"same": before == after, "threads": threading.active_count(), "written": written}))
"""


def test_all_is_what_is_promised() -> None:
    assert sorted(pactown_runner.__all__) == pactown_runner.__all__
    assert set(pactown_runner.__all__) >= PUBLIC
    for name in pactown_runner.__all__:
        assert getattr(pactown_runner, name).__doc__
    assert set(dir(pactown_runner)) >= set(pactown_runner.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Supervisr'"):
        pactown_runner.Supervisr  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("source", "unwanted"),
    [
        ("import pactown_runner", {"asyncio", "cgroups", "dataclasses", "sqlite3", "structlog"}),
        ("from pactown_runner import SandboxSpec, Limits, RunnerError", {"asyncio", "sqlite3", "structlog"}),
        ("from pactown_runner import *", {"rich", "structlog"}),
        ("import pactown_runner.cli", {"asyncio", "cgroups", "rich", "structlog", "typer"}),
        ("from pactown_runner.cli.app import make_app; make_app()", {"asyncio", "rich", "sqlite3", "structlog"}),
    ],
)
def test_what_is_not_needed_is_not_imported(source: str, unwanted: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{source}\nimport sys; print(*sys.modules)"],
        cwd=Path(pactown_runner.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert unwanted & set(done.stdout.split()) == set()


@pytest.mark.parametrize("name", MODULES)
def test_each_module_says_what_it_offers(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    offered = module.__all__
    assert len(set(offered)) == len(offered)
    for word in offered:
        assert hasattr(module, word)


def test_errors_have_codes_of_their_own() -> None:
    classes = [getattr(errors, name) for name in errors.__all__]
    assert all(issubclass(one, errors.RunnerError) for one in classes)
    assert len({one.code for one in classes}) == len(classes)
    error = errors.StateError("cannot stop", remedy="start first")
    assert (str(error), error.message, error.remedy) == (
        "cannot stop (start first)",
        "cannot stop",
        "start first",
    )
    assert str(errors.StateError("cannot stop")) == "cannot stop"


def test_importing_has_no_effect(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOOK, *MODULES],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(pactown_runner.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout), done.stderr) == ({"same": True, "threads": 1, "written": []}, "")


def test_the_package_is_typed() -> None:
    assert Path(pactown_runner.__file__).with_name("py.typed").exists()
