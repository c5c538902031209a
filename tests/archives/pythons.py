"""The Pythons of this machine, each where a tenant can execute it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PLACES = (
    ("/usr/bin", "python3.*"),
    ("/usr/local/bin", "python3.*"),
    ("/opt", "*/bin/python3.*"),
    (os.path.expanduser("~/.pyenv/versions"), "*/bin/python3.*"),
    (os.path.expanduser("~/.local/share/uv/python"), "*/bin/python3.*"),
)


def found() -> dict[str, Path]:
    """Every Python 3 that is installed, by its version; the system's own first."""
    pythons: dict[str, Path] = {}
    for place, pattern in PLACES:
        for path in sorted(Path(place).glob(pattern)):
            if path.name.removeprefix("python3.").isdecimal() and os.access(path, os.X_OK):
                done = subprocess.run([path, "-V"], capture_output=True, text=True, check=False)
                if done.returncode == 0:
                    pythons.setdefault(done.stdout.split()[1], path.resolve())
    return pythons


def within_reach(python: Path, folder: Path) -> Path:
    """A program that runs this Python as anybody: itself, or a copy of it, whose parts are the same files."""
    if all(directory.stat().st_mode & 1 for directory in python.parents):
        return python
    prefix, library = python.parents[1], f"lib/{python.name}"
    copy = folder / prefix.name
    copy.mkdir(parents=True)
    copy.chmod(0o755)
    folder.chmod(0o755)
    for part in ("bin", "lib"):
        (copy / part).mkdir(mode=0o755)
        (copy / part).chmod(0o755)
    os.link(python, copy / "bin" / python.name)
    for shared in (prefix / "lib").glob("libpython*.so*"):
        subprocess.run(["cp", "-al", shared, copy / "lib"], check=True)
    subprocess.run(["cp", "-al", prefix / library, copy / library], check=True)
    program = copy / "run"
    program.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={copy}/lib exec {copy}/bin/{python.name} "$@"\n')
    program.chmod(0o755)
    return program
