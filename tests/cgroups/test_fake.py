"""The fake tree is held against the real one, as far as this kernel and host go."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cgroups import Cgroup, parse_bytes
from tests.cgroups.fake import CONTROLLERS, CORE, make_fake

pytestmark = pytest.mark.host

# Files that came with a kernel option or a later kernel than the oldest supported one.
OPTIONAL = {"cgroup.pressure", "cgroup.stat", "cgroup.stat.local", "cpu.stat.local", "irq.pressure"}
WRITE_ONLY = {"cgroup.kill"}


def core_files(directory: Path) -> set[str]:
    """The files that are there without any controller; without PSI there are no pressure files."""
    return {
        path.name
        for path in directory.iterdir()
        if path.name.startswith("cgroup.") or path.name.endswith(".pressure") or path.name.startswith("cpu.stat")
    }


def shape(text: str) -> list[str]:
    """A text without its numbers."""
    return [re.sub(r"[0-9.]+", "N", line) for line in text.splitlines()]


def test_the_fake_has_the_core_files_of_the_kernel(group: Cgroup) -> None:
    real = core_files(group.path)
    assert set(CORE) <= real | {name for name in CORE if name.endswith(".pressure")}
    assert real - set(CORE) <= OPTIONAL


def test_core_files_read_as_the_kernels(group: Cgroup) -> None:
    for name in set(CORE) - WRITE_ONLY - {"cgroup.controllers", "cpu.stat"}:
        if (group.path / name).exists():
            assert shape((group.path / name).read_text()) == shape(CORE[name]), name
    assert set(shape(CORE["cpu.stat"])) <= set(shape((group.path / "cpu.stat").read_text()))


def test_files_of_the_hosts_controllers_read_as_the_kernels(group: Cgroup) -> None:
    offered = sorted(set(CONTROLLERS) & group.controllers())
    if not offered:
        pytest.skip("needs the v2 controllers cpu, memory or pids on this host")
    for name, text in {name: text for each in offered for name, text in CONTROLLERS[each].items()}.items():
        if (group.path / name).exists():
            assert set(shape(text)) <= set(shape((group.path / name).read_text())), name


def test_modes_let_the_same_files_be_written(group: Cgroup, tmp_path: Path) -> None:
    # Root may write any plain file: the fake must not be asked to write what the kernel has read-only.
    read_only = {"cgroup.controllers", "cgroup.events", "cpu.stat"}
    for name in CORE:
        if (group.path / name).exists():
            assert bool((group.path / name).stat().st_mode & 0o200) == (name not in read_only), name
    with make_fake(tmp_path / "fake.slice", []) as fake:
        fake.request_freeze(True)
        assert (fake.path / "cgroup.freeze").read_text() == "1"
    group.request_freeze(True)
    assert parse_bytes((group.path / "cgroup.freeze").read_text()) == 1
