"""The program compiles without a warning, for both machines, and comes with the wheel."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pactown_runner.launcher import LaunchSpec
from pactown_runner.launcher.build import BuildError, build, find_compiler, machine_of

ROOT = Path(__file__).resolve().parents[2]
PT_DYNAMIC, PT_INTERP = 2, 3


def segment_types(program: bytes) -> set[int]:
    offset, size, number = struct.unpack_from("<Q14xHH", program, 32)
    return {struct.unpack_from("<I", program, offset + index * size)[0] for index in range(number)}


def test_it_compiles_and_needs_nothing(tmp_path: Path) -> None:
    program = build(tmp_path / "launch")
    assert program.stat().st_mode & 0o7777 == 0o755
    assert not segment_types(program.read_bytes()) & {PT_DYNAMIC, PT_INTERP}
    assert machine_of(program) == os.uname().machine
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


def test_without_a_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(BuildError, match="apt install gcc"):
        find_compiler()


def test_a_failed_build_leaves_the_old_program(tmp_path: Path) -> None:
    program = tmp_path / "launch"
    program.write_text("old")
    with pytest.raises(BuildError):
        build(program, compiler=["false"])
    assert program.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


def test_it_compiles_for_arm64(tmp_path: Path) -> None:
    compiler = "aarch64-linux-gnu-gcc"
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler} (apt install gcc-aarch64-linux-gnu)")
    program = build(tmp_path / "launch", compiler=[compiler])
    assert machine_of(program) == "aarch64"
    if not shutil.which("qemu-aarch64"):
        pytest.skip("compiled; to run it needs qemu-aarch64 (apt install qemu-user)")
    # The emulator makes no children with CLONE_PARENT, so this goes as far as the parent half's refusal of root.
    packed = LaunchSpec(argv=["true"], uid=1, gid=1).pack()
    spec_fd = os.memfd_create("spec")
    os.write(spec_fd, packed[:16] + bytes(4) + packed[20:])
    read_end, write_end = os.pipe()
    words = ["qemu-aarch64", str(program), str(spec_fd), str(write_end), "-1"]
    done = subprocess.run(words, pass_fds=(spec_fd, write_end), check=False)
    os.close(spec_fd)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        assert struct.unpack("<IIiIiI", pipe.read()) == (3, 24, 0, 0, 1, 0)
    assert done.returncode == 127


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "hatch_build.py"):
        shutil.copy(ROOT / name, tree)
    for name in ("pactown_runner", "cgroups"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "launch"))
    for name in ("README.md", "LICENSE"):
        (tree / name).touch()
    return tree


def wheel(tree: Path, **env: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    return subprocess.run(words, cwd=tree, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def test_a_wheel_brings_the_program_and_pip_installs_it(tree: Path, tmp_path: Path) -> None:
    done = wheel(tree)
    assert done.returncode == 0, done.stderr
    (made,) = (tree / "dist").iterdir()
    assert "manylinux" in made.name
    assert made.name.endswith(f"_{os.uname().machine}.whl")
    target = tmp_path / "installed"
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(made),
    ]
    subprocess.run(words, check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    program = target / "pactown_runner" / "launcher" / "launch"
    assert os.access(program, os.X_OK)
    assert subprocess.run([program], check=False).returncode == 126


def test_without_a_compiler_the_wheel_is_pure_unless_that_is_refused(tree: Path) -> None:
    done = wheel(tree, CC="/no/such/compiler")
    assert done.returncode == 0, done.stderr
    assert "no launcher" in done.stdout + done.stderr
    (made,) = (tree / "dist").iterdir()
    assert made.name.endswith("-py3-none-any.whl")
    assert wheel(tree, CC="/no/such/compiler", PACTOWN_REQUIRE_LAUNCHER="1").returncode != 0
