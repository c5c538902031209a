"""Documents that are run: the blocks of a Markdown file, in order, as whoever types and pastes them has them.

All blocks of a document are steps of one shell session, in a state and a directory of the test's own:

    ```sh        is run; each command has to succeed
    ```console   is typed line by line behind `# `; what stands below a command is what it prints
    ```python    is run as a program; what `await`s at the top, or goes on with what did, is run within
                 `async with Supervisor() as supervisor`: one process for all such blocks of a document, at the place of
                 the last of them
    ```toml      is put into /etc/pactown/pactown.toml
    ```text      is what the Python above prints

In what is printed `…` stands for whatever there is in a line, and a line `...` for any lines. Uids, keys, ports and the
directories of the state are the test's, and columns are as wide as those need.

A comment above a block says what is to be different, and nothing else can:

    <!-- server -->       it runs until the document ends, or the next such block; what follows waits for it to be ready
    <!-- kernel -->       it needs memory, cpu and pids controllers: it is run in the kernel lane only
    <!-- kernel too -->   what is run there goes on with it
    <!-- not run: WHY --> WHY is one of `REASONS`

or several, with commas between them.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 150.0
"""So long a document may take, on a machine that has much else to do."""

REASONS = frozenset({"it installs packages", "it needs systemd", "it is how these tests are run"})
_MARKS = frozenset({"server", "kernel", "kernel too"})
_LANGUAGES = frozenset({"sh", "console", "python", "toml", "text", "json"})
_BLOCK = re.compile(r"^(?:<!-- (?P<mark>.*?) -->\n)?```(?P<language>.*)\n(?P<text>(?:.*\n)*?)```$", re.MULTILINE)
_PORTS = ("8600", "8001", "8002")
"""Those that documents have. Here others are free."""
_BETWEEN = "\x1e"


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        where: the document, and the line that its text begins in.
        language: what stands behind the fence.
        text: what is within.
        marks: what the comment above says.
    """

    where: str
    language: str
    text: str
    marks: frozenset[str] = frozenset()

    @property
    def is_run(self) -> bool:
        """Whether anybody runs it."""
        return not any(mark.startswith("not run") for mark in self.marks)

    @property
    def is_part(self) -> bool:
        """Whether it is Python that goes on with what stands above: it awaits, or uses a name that it does not make."""
        tree = ast.parse(self.text)
        code = compile(tree, self.where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if code.co_flags & inspect.CO_COROUTINE:
            return True
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        aliases = [node for node in ast.walk(tree) if isinstance(node, ast.alias)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        made |= {alias.asname or alias.name for alias in aliases} | set(dir(builtins))
        made |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        made |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        return any(node.id not in made for node in names)


@dataclass
class Step:
    """What is typed at once, and what it prints.

    Attributes:
        where: for people.
        command: of the shell.
        prints: what the document says, a text for each part that is told apart; None where it says nothing.
        serves: whether it goes on beside what follows.
    """

    where: str
    command: str
    prints: list[str | None]
    serves: bool = False


def blocks(path: Path) -> list[Block]:
    """The blocks of a document.

    Raises:
        AssertionError: a mark, a language or a reason that nobody knows.
    """
    document, found = path.read_text(), []
    for match in _BLOCK.finditer(document):
        line = document.count("\n", 0, match.start("text")) + 1
        marks = frozenset(match["mark"].split(", ")) if match["mark"] else frozenset()
        block = Block(f"{path.name}:{line}", match["language"], match["text"], marks)
        assert block.language in _LANGUAGES, f"{block.where}: nobody knows how to run {block.language!r}"
        assert all(mark in _MARKS or mark.removeprefix("not run: ") in REASONS for mark in marks), (block.where, marks)
        found.append(block)
    assert 2 * len(found) == len(re.findall(r"^```", document, re.MULTILINE)), f"{path.name}: a fence is not closed"
    return found


class Session:
    """The shell session of one document.

    Args:
        directory: of the test's own, for scripts and as the place to work in.
        environ: leads commands to the test's state.
        command: what `pactown-runner` is.
        homes, run: where the test's state has what documents call /home/pactown_users and /run/pactown.
    """

    def __init__(
        self, directory: Path, environ: Mapping[str, str], command: Sequence[str], *, homes: Path, run: Path
    ) -> None:
        self._steps = directory / "steps"
        self._work = directory / "work"
        self._etc = directory / "etc"
        self._run = run
        for path in (self._steps, self._work, self._etc):
            path.mkdir()
        (self._etc / "pactown.toml").touch()
        (directory / "bin").mkdir()
        shim = directory / "bin/pactown-runner"
        # The doctor's verdict is the host's, and not the document's.
        shim.write_text(
            f'#!/bin/sh\n[ "$1" = doctor ] || exec {shlex.join(command)} "$@"\n'
            f'{shlex.join(command)} "$@"\nstatus=$?; [ $status -le 1 ] && exit 0; exit $status\n'
        )
        shim.chmod(0o755)
        own = {"PACTOWN_CONFIG": str(self._etc / "pactown.toml"), "PATH": f"{shim.parent}:{os.environ['PATH']}"}
        self._environ = {**environ, **own}
        self._ours = {
            "/home/pactown_users": str(homes),
            "/run/pactown": str(run),
            "/etc/pactown": str(self._etc),
            **dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True)),
        }

    def follow(self, document: Sequence[Block], seconds: float = SECONDS) -> None:
        """Run the blocks of a document.

        Raises:
            AssertionError: one of them fails, prints something else, or is not done after so many seconds.
        """
        steps = list(self._steps_of(document))
        failed, in_time = self._run_all(steps, seconds)
        wrong: list[str] = []
        for number, step in enumerate(steps):
            out = self._steps / f"{number}.out"
            printed = out.read_text() if out.exists() else ""
            if number == failed:
                what = "failed" if in_time else f"not done after {seconds:g} s"
                wrong.append(f"{step.where}: {what}:\n{step.command}\n{printed}")
                break
            parts = printed.split(f"{_BETWEEN}\n")
            for expected, part in zip(step.prints, parts, strict=False):
                if expected is not None and not self._is(expected, part):
                    wrong.append(f"{step.where}: {step.command}\nshould print\n{expected}\nand printed\n{part}")
        assert not wrong, "\n\n".join(wrong)

    # Steps ------------------------------------------------------------------------------------------------------

    def _steps_of(self, document: Sequence[Block]) -> Iterator[Step]:
        fragments = [block for block in document if block.language == "python" and block.is_part]
        for block, after in zip(document, [*document[1:], None], strict=True):
            shown = after.text if after is not None and after.language == "text" else None
            if block.language == "console":
                yield from _typed(block)
            elif block.language == "sh":
                yield Step(block.where, block.text, [None], serves="server" in block.marks)
            elif block.language == "toml":
                yield Step(block.where, _heredoc("/etc/pactown/pactown.toml", block.text), [None])
            elif block.language == "json":
                json.loads(block.text)
            elif block.language == "python" and block not in fragments:
                yield Step(block.where, self._python(block.where, block.text), [shown])
            elif fragments and block is fragments[-1]:
                yield self._fragments(document, fragments)

    def _fragments(self, document: Sequence[Block], fragments: Sequence[Block]) -> Step:
        shown = dict(pairwise(document))
        prints = [after.text if (after := shown.get(part)) and after.language == "text" else None for part in fragments]
        inside = f"print({_BETWEEN!r}, flush=True)\n".join(f"# {block.where}\n{block.text}" for block in fragments)
        program = (
            "import asyncio\nfrom pactown_runner import Supervisor\nasync def main():\n"
            f"    async with Supervisor() as supervisor:\n{textwrap.indent(inside, ' ' * 8)}\nasyncio.run(main())\n"
        )
        return Step(fragments[-1].where, self._python(f"parts, up to {fragments[-1].where}", program), prints)

    def _python(self, where: str, text: str) -> str:
        script = self._work.parent / f"{len(list(self._work.parent.glob('*.py')))}.py"
        script.write_text(f"# {where}\n{self._changed(text)}")
        return f"{shlex.quote(sys.executable)} {shlex.quote(str(script))}"

    def _changed(self, text: str) -> str:
        for theirs, ours in self._ours.items():
            text = re.sub(rf"(?<!\w){re.escape(theirs)}\b", ours.replace("\\", r"\\"), text)
        return text

    # The session ------------------------------------------------------------------------------------------------

    def _run_all(self, steps: Sequence[Step], seconds: float) -> tuple[int | None, bool]:
        """Run them, and return the number of the one that failed, and whether the session ended by itself."""
        lines = [_BEGIN]
        for number, step in enumerate(steps):
            file = self._steps / str(number)
            file.write_text(self._changed(step.command))
            name = shlex.quote(str(file))
            if step.serves:
                lines.append(f'end_server; (eval "exec $(cat {name})") >{name}.out 2>&1 </dev/null & server=$!')
                lines.append(_READY.format(socket=shlex.quote(str(self._run / "api.sock"))))
            else:
                lines.append(f'eval "$(cat {name})" >{name}.out 2>&1 </dev/null')
            lines.append(f": >{name}.done")
        script = self._steps / "session"
        script.write_text("\n".join(lines) + "\n")
        session = subprocess.Popen(
            ["bash", str(script)],
            cwd=self._work,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                session.wait(seconds)
        finally:
            in_time = session.poll() is not None
            if not in_time:
                os.killpg(session.pid, signal.SIGKILL)
                session.wait()
        done = [(self._steps / f"{number}.done").exists() for number in range(len(steps))]
        return None if all(done) else done.index(False), in_time

    # What was printed -------------------------------------------------------------------------------------------

    def _is(self, expected: str, printed: str) -> bool:
        pattern = "".join(map(_pattern, self._as_documented(expected).splitlines()))
        lines = self._as_documented(printed).splitlines()
        return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None

    def _as_documented(self, text: str) -> str:
        for theirs, ours in self._ours.items():
            text = text.replace(ours, theirs)
        # The key is longer where another run of these tests has the same tenant.
        text = re.sub(r"(?<=pactown[_-])[0-9a-f]{8,24}\b", "KEY", text)
        text = text.replace(self._environ["PACTOWN_CGROUP_SLICE"], "pactown.slice")
        return re.sub(r" +", " ", re.sub(r"\b\d{5}\b", "UID", text))


_BEGIN = """\
set -eu -o pipefail
server=
end_server() { [ -z "$server" ] || { kill $server; wait $server || :; }; }
trap end_server EXIT"""
_READY = """\
until [ -S {socket} ] && curl -fsS --unix-socket {socket} http://localhost/readyz >/dev/null 2>&1; do
    kill -0 $server
    sleep 0.1
done"""


def _typed(block: Block) -> Iterator[Step]:
    """The commands of a console, and what stands below them."""
    document, _, line = block.where.rpartition(":")
    command: list[str] = []
    shown: list[str] = []
    where = int(line)
    for number, text in enumerate([*block.text.splitlines(), "# "], int(line)):
        if text.startswith("# ") and command:
            yield Step(f"{document}:{where}", "\n".join(command), ["".join(f"{part}\n" for part in shown)])
            command, shown, where = [], [], number
        if text.startswith("# ") or _goes_on("\n".join(command)):
            command.append(text.removeprefix("# "))
        else:
            assert command, f"{block.where}: a console begins with a command, behind '# '"
            shown.append(text)


def _goes_on(command: str) -> bool:
    """Whether the line that follows is a part of it: it ends within quotes, or behind a backslash."""
    try:
        shlex.split(command)
    except ValueError:
        return True
    return command.endswith("\\")


def _pattern(line: str) -> str:
    if line == "...":
        return r"(?:.*\n)*?"
    return re.escape(line.rstrip()).replace("…", ".*") + r"[ \t]*\n"


def _heredoc(path: str, text: str) -> str:
    return f"cat >{path} <<'END-OF-BLOCK'\n{text}END-OF-BLOCK\n"


def _free_ports(count: int) -> list[str]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [str(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
