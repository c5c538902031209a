"""Children: the programs of `inside`, run as a tenant in a leaf of its own.

Which Python they run on is the tenant's side of things: it has to be one that every tenant can execute, with its
library. The one that this process runs on may well not be, such as one below `/root`.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import StartError
from ..host import Host
from ..jobs import Job, Stop, job
from ..launcher import Directory
from ..models import IsolatedUser
from ..passage import way_to
from .errors import ArchiveError
from .inside import wire

__all__ = ["Child", "LeftOut", "Said", "child", "find_python"]

Program = Literal["packing", "extracting", "emptying"]

_MODULES: Mapping[Program, tuple[str, ...]] = {
    "packing": ("wire", "blocks", "manifest", "looking", "packing"),
    "extracting": ("wire", "blocks", "manifest", "unpressing", "extracting"),
    "emptying": ("wire", "looking", "emptying"),
}
"""Each module behind those that it imports."""

_NUMBERS: Mapping[Program, set[str]] = {
    "packing": {"entries", "files", "bytes", "skipped"},
    "extracting": {"entries", "files", "bytes", "skipped", "verified"},
    "emptying": {"left"},
}
"""What each has to say when it is done."""

_USUAL_PYTHONS = ("/usr/bin/python3", "/usr/local/bin/python3")

_BOOT = """\
import sys
if sys.version_info < (3, 9):
    sys.exit("it needs Python 3.9 or newer, and %s is %s" % (sys.executable, sys.version.split()[0]))
exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())), "pactown", "exec"))
"""
"""The program comes by standard input, and so do its arguments: command lines are for all to see."""

_LOAD = """\
import json, types
def load(name, source):
    module = sys.modules["inside." + name] = types.ModuleType("inside." + name)
    module.__package__ = "inside"
    setattr(inside, name, module)
    exec(compile(source, name, "exec"), module.__dict__)
inside = sys.modules["inside"] = types.ModuleType("inside")
inside.__path__ = []
"""


class LeftOut(NamedTuple):
    """What was not taken along. The tenant's, or the archive's, word.

    Attributes:
        path: relative to the home.
        reason: `FIFO`, `socket`, `device`, `venv`, `unreadable` or `vanished`.
    """

    path: str
    reason: str


class Said(NamedTuple):
    """What a child said when it was done: numbers by name, and what was left out."""

    numbers: Mapping[str, int]
    left_out: tuple[LeftOut, ...]


class Child:
    """A child that waits for its work."""

    def __init__(self, running: Job, program: Program) -> None:
        self._job = running
        self._program = program

    def begin(self, arguments: Mapping[str, Any]) -> None:
        """Give it its work."""
        text = program_text(self._program)
        self.feed(b"%d\n%s%s\n" % (len(text), text, json.dumps(arguments).encode()))

    def feed(self, data: bytes) -> bool:
        """Give it input; False if it takes no more, about which `take` will say why."""
        try:
            self._job.write(data)
        except BrokenPipeError:
            return False
        return True

    def take(self, on_data: Callable[[bytes], object] | None = None) -> Said:
        """Let its input end, hand on what data it sends, and see it end well.

        Raises:
            ArchiveError: it refused, failed, or said what makes no sense.
            FilesError: it was stopped.
        """
        self._job.end_input()
        numbers: dict[str, int] | None = None
        left_out: list[LeftOut] = []
        try:
            for kind, payload in wire.receive(self._job.output.read):
                if numbers is not None:
                    raise ValueError("it goes on behind its end")
                if kind == wire.DONE:
                    numbers = _numbers(payload, _NUMBERS[self._program])
                elif kind == wire.SKIPPED and len(left_out) < wire.MAX_SKIPPED:
                    left_out.append(_left_out(payload))
                elif kind == wire.DATA and on_data is not None:
                    on_data(payload)
                else:
                    raise ValueError("it holds what was not asked for")
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"what the tenant's process says cannot be understood: {error}") from error
        code = self._job.wait()
        if code != 0 or numbers is None:
            raise ArchiveError(self._job.message() or f"the tenant's process {_how(code)}, and said nothing")
        return Said(numbers, tuple(left_out))


@contextmanager
def child(
    host: Host,
    user: IsolatedUser,
    program: Program,
    directory: Path,
    *,
    python: Path | None,
    timeout: float,
    stop: Stop,
    run_id: str | None = None,
) -> Iterator[Child]:
    """Start one of the programs; when the block is left, however, nothing of it runs any more.

    Args:
        directory: where it works; entered as the tenant.
        python: what executes it, see `find_python`.
        timeout, stop, run_id: as for `job`.

    Raises:
        ArchiveError: it could not be started.
        RunnerError: see `job`.
    """
    argv = (str(python or find_python()), "-I", "-S", "-c", _BOOT)
    try:
        with job(
            host,
            user,
            argv,
            directories=[Directory(directory)],
            stdin=True,
            stdout=True,
            timeout=timeout,
            stop=stop,
            run_id=run_id,
        ) as running:
            yield Child(running, program)
    except StartError as error:
        remedy = "name a Python that tenants can execute" if error.step == "execve" else error.remedy
        raise ArchiveError(f"cannot start {argv[0]} as the tenant: {error.message}", remedy=remedy) from error


@functools.cache
def find_python() -> str:
    """The first Python that everybody on this host can execute; without root, our own.

    Raises:
        ArchiveError: there is none.
    """
    own = os.path.realpath(sys.executable)
    if os.geteuid() != 0 or (_open_to_all(own) and _open_to_all(os.__file__)):
        return own
    for path in _USUAL_PYTHONS:
        if _open_to_all(path):
            return path
    raise ArchiveError(
        f"tenants can execute none of {', '.join((own, *_USUAL_PYTHONS))}", remedy="install the system's python3"
    )


@functools.cache
def program_text(program: Program) -> bytes:
    """The source of one of the programs, with all that it imports of `inside`."""
    sources = Path(__file__).with_name("inside")
    lines = [f"load({name!r}, {sources.joinpath(f'{name}.py').read_text('utf-8')!r})" for name in _MODULES[program]]
    return "\n".join([_LOAD, *lines, f"inside.{program}.serve(json.loads(sys.stdin.buffer.readline()))"]).encode()


def _open_to_all(path: str) -> bool:
    """Whether everybody can read and execute a file, or read it if it is no program."""
    try:
        found = os.stat(path)
        wanted = stat.S_IROTH | (stat.S_IXOTH & (found.st_mode >> 6))
        passable = all(directory.stat().st_mode & stat.S_IXOTH for directory in way_to(Path(path)))
    except OSError:
        return False
    return passable and found.st_mode & wanted == wanted


def _numbers(payload: bytes, names: set[str]) -> dict[str, int]:
    values = json.loads(payload)
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError("its summary is malformed")
    if not all(isinstance(value, int) and value >= 0 for value in values.values()):
        raise ValueError("its summary is malformed")
    return values


def _left_out(payload: bytes) -> LeftOut:
    reason, _, path = payload.partition(b"\0")
    return LeftOut(path.decode("utf-8", "backslashreplace"), reason.decode("ascii", "replace"))


def _how(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
