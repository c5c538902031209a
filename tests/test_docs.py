"""What the documents say is so: each block is run, each row is checked, each reference leads somewhere."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from functools import cache
from inspect import iscoroutinefunction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cgroups import parse_bytes
from pactown_runner import Client, Limits, Probe, RestartPolicy, SandboxSpec, Settings, Supervisor, errors
from pactown_runner.api import table
from pactown_runner.cli.app import make_app
from pactown_runner.metrics import Metrics
from pactown_runner.supervisor_users import SupervisorUsers
from tests.cli.conftest import COMMAND
from tests.documents import ROOT, Session, blocks

pytest_plugins = ("tests.supervising",)

DOCS = sorted((ROOT / "docs").glob("*.md"))
RUN = [ROOT / "README.md", *(path for path in DOCS if path.name not in ("architecture.md", "operations.md"))]
"""Documents whose blocks are run here."""
WITH_LIMITS = [path for path in RUN if "<!-- kernel -->" in path.read_text()]
LINKED = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *DOCS]


@pytest.fixture
def session(settings: Settings, tmp_path: Path) -> Session:
    first, last = settings.uid_ranges[0]
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PACTOWN_USERS_BASE": str(settings.users_base),
        "PACTOWN_CGROUP_SLICE": settings.cgroup_slice,
        "PACTOWN_UID_RANGES": f"{first}-{last}",
        "COLUMNS": "120",
    }
    return Session(tmp_path, environ, COMMAND, homes=settings.users_base, run=settings.run_dir)


@pytest.mark.host
@pytest.mark.deadline(200)
@pytest.mark.parametrize("path", RUN, ids=lambda path: path.stem)
def test_blocks_do_what_they_say(path: Path, session: Session) -> None:
    session.follow([block for block in blocks(path) if block.is_run and "kernel" not in block.marks])


@pytest.mark.kernel
@pytest.mark.beside
@pytest.mark.deadline(400)
@pytest.mark.parametrize("path", WITH_LIMITS, ids=lambda path: path.stem)
def test_limits_do_what_they_say(path: Path, session: Session) -> None:
    document = blocks(path)
    chosen = [block for block in document if {"kernel", "kernel too"} & block.marks]
    shown = [after for block, after in pairwise(document) if block in chosen and after.language == "text"]
    # Under emulation each command takes seconds.
    session.follow([block for block in document if block in chosen or block in shown], 360)


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", path.read_text()):
        assert not target or (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.stem)
def test_tests_that_are_named_are_there(path: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", path.read_text()):
        assert (ROOT / file).is_file(), f"{path.name}: {file}"
        assert not name or name in _functions(ROOT / file), f"{path.name}: {file}::{name}"


@cache
def _functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_all_routes_are_told_of_with_what_they_need() -> None:
    rows = re.findall(r"^\| ([A-Z]+) \| `(/\S*)` \| (\S+) \|$", (ROOT / "docs/rest.md").read_text(), re.MULTILINE)
    ours = [
        (row.method, row.path.replace(":path", ""), row.access.role + "*" * row.access.whole_host) for row in table.ROWS
    ]
    assert sorted(rows) == sorted(ours)


def test_all_methods_of_the_client_are_told_of_with_their_routes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([A-Z]+ /\S*)` \| ", (ROOT / "docs/rest.md").read_text(), re.MULTILINE)
    ours = [name for name in dir(Client) if not name.startswith("_") and callable(getattr(Client, name))]
    assert sorted(name for name, _ in rows) == sorted({*ours} - {"aclose"})
    assert {route for _, route in rows} <= {f"{row.method} {row.path.replace(':path', '')}" for row in table.ROWS}


def test_all_codes_of_errors_are_told_of() -> None:
    """And the classes that they are of."""
    told = (ROOT / "docs/embedding.md").read_text()
    for name in set(errors.__all__) - {"RunnerError"}:
        kind = getattr(errors, name)
        assert f"`{name}`" in told, name
        assert f"`{kind.code}`" in told, kind.code


@pytest.mark.parametrize("kind", [SandboxSpec, RestartPolicy, Probe])
def test_all_fields_are_told_of_with_their_defaults(kind: type[Any]) -> None:
    _, found, table = (
        (ROOT / "docs/embedding.md").read_text().partition(f"| field of `{kind.__name__}` | default | |\n")
    )
    assert found
    rows = re.findall(r"^\| `(\w+)` \|(?: `(.+?)`)? \| \S", table.partition("\n\n")[0], re.MULTILINE)
    names = {"RestartPolicy": RestartPolicy, "frozenset": frozenset}
    told = {name: eval(default, names) if default else MISSING for name, default in rows}
    ours = {item.name: _default(item) for item in fields(kind) if item.init}
    assert told == ours


def _default(item: Field[Any]) -> object:
    return item.default if item.default_factory is MISSING else item.default_factory()


def test_all_limits_and_all_that_can_be_done_with_tenants_are_told_of() -> None:
    told = (ROOT / "docs/embedding.md").read_text()
    assert [item.name for item in fields(Limits) if f"`{item.name}`" not in told] == []
    assert [name for name in _coroutines(SupervisorUsers) if f"`{name}`" not in told] == []


def _coroutines(kind: type[Any]) -> list[str]:
    return [name for name, item in vars(kind).items() if iscoroutinefunction(item) and not name.startswith("_")]


def test_defaults_are_those_of_the_settings() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ", (ROOT / "docs/security.md").read_text(), re.MULTILINE)
    assert len(rows) > 5
    for name, default in rows:
        assert getattr(Settings(), name) == (None if default == "none" else parse_bytes(default)), name


def test_all_commands_are_told_of_with_their_options() -> None:
    rows = re.findall(
        r"^\| `([a-z]+(?: [a-z]+)?)\b[^`]*` \| [^|]+ \|(.*)\|$", (ROOT / "docs/cli.md").read_text(), re.MULTILINE
    )
    told = {name: set(re.findall(r"`(--[a-z-]+)`", options)) for name, options in rows}
    ours = dict(_commands(get_command(make_app())))
    assert told.keys() == ours.keys()
    for name, options in ours.items():
        assert told[name] == options, name


COMMON = {"--help", "--json", "--server", "--users-base", "--config"}


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, set[str]]]:
    """Each command, with the options that are not required, nor those of most."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
            continue
        found = [item for item in command.params if item.param_type_name == "option" and not item.required]
        words = {word for item in found if not item.hidden for word in (*item.opts, *item.secondary_opts)}
        yield before + name, {word for word in words if word.startswith("--")} - COMMON


def test_all_words_of_make_are_told_of() -> None:
    told = re.findall(r"^\| `make ([a-z-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    ours = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(told) == sorted({*ours} - {"help"})


@pytest.mark.host
async def test_all_metrics_are_told_of(supervisor: Supervisor) -> None:
    counted = Metrics(supervisor)
    async with counted.watching():
        text = (await counted.render()).decode()
    ours = set(re.findall(r"^# TYPE (pactown_\w+)", text, re.MULTILINE))
    told = set(re.findall(r"`(pactown_\w+)`", (ROOT / "docs/metrics.md").read_text()))
    assert told <= ours
    assert {name for name in ours - told if not name.startswith("pactown_tenant_")} == set()
