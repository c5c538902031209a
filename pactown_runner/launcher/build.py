"""Compile the launcher: `python -m pactown_runner.launcher.build`.

Also loaded by path from `hatch_build.py`, in a build environment that has none of this project's dependencies:
standard library only, and nothing of this package.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["BuildError", "build", "find_compiler", "machine_of", "main"]

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "launch.c"
BINARY = HERE / "launch"
REMEDY = "install a C compiler and the kernel's headers (Debian: apt install gcc libc6-dev), or name one in $CC"

FLAGS = (
    *("-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-pie"),
    *("-nostdlib", "-static", "-no-pie", "-s"),
    # Headers and code in one page: each page less is a page fault less at every start.
    *("-Wl,-z,noseparate-code", "-Wl,-z,noexecstack", "-Wl,-z,norelro", "-Wl,--build-id=none"),
)


class BuildError(Exception):
    """The launcher cannot be compiled here. The message says why, and what to do."""


def find_compiler() -> list[str]:
    """Return the compiler's command: `$CC`, else the first of cc, gcc and clang.

    Raises:
        BuildError: there is none.
    """
    for command in [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]:
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise BuildError(f"no C compiler was found: {REMEDY}")


def build(target: Path = BINARY, *, compiler: list[str] | None = None) -> Path:
    """Compile `launch.c` to `target`, which appears whole or not at all, and return it.

    Raises:
        BuildError: there is no compiler, or it refused.
    """
    command = compiler or find_compiler()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".launch-") as folder:
        made = Path(folder) / "launch"
        done = subprocess.run(
            [*command, *FLAGS, "-o", str(made), str(SOURCE)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}\n{REMEDY}")
        made.chmod(0o755)
        # A running launcher keeps the old file; writing over it would be ETXTBSY.
        made.replace(target)
    return target


def machine_of(binary: Path) -> str:
    """Return for which machine `binary` was made, by the name in wheel tags: a compiler may be a cross compiler.

    Raises:
        BuildError: for none that the launcher knows.
    """
    machine = int.from_bytes(binary.read_bytes()[18:20], "little")  # e_machine, elf(5)
    try:
        return {62: "x86_64", 183: "aarch64"}[machine]
    except KeyError as error:
        raise BuildError(f"{binary} is for ELF machine {machine}, which the launcher does not know") from error


def main() -> int:
    """Compile the launcher beside its source; 0 if that worked."""
    try:
        print(build())
    except (BuildError, OSError) as error:
        print(f"cannot build the launcher: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
