"""Children: the programs of `inside`, run as a tenant in a leaf of its own, by a Python that tenants can execute."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import StartError
from ..host import Host
from ..jobs import Job, Stop, job
from ..launcher import Directory
from ..models import IsolatedUser
from ..pythons import find_python
from .errors import ArchiveError
from .inside import wire

__all__ = ["Child", "LeftOut", "Said", "child"]

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
        ConfigError: there is no Python that tenants can execute.
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
def program_text(program: Program) -> bytes:
    """The source of one of the programs, with all that it imports of `inside`."""
    sources = Path(__file__).with_name("inside")
    lines = [f"load({name!r}, {sources.joinpath(f'{name}.py').read_text('utf-8')!r})" for name in _MODULES[program]]
    return "\n".join([_LOAD, *lines, f"inside.{program}.serve(json.loads(sys.stdin.buffer.readline()))"]).encode()


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
