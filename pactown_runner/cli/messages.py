"""How commands end and what they say then: errors with their remedy, for people or as JSON, and exit codes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from cgroups import CgroupError

from ..errors import RunnerError
from .visible import visible

__all__ = [
    "FAILED",
    "LOOK_FOR_USERS",
    "NO_READER",
    "Ended",
    "drop_output",
    "errors_told",
    "look_for_services",
    "say",
    "typed",
    "write_json",
    "write_line",
]

FAILED = 1
"""The exit code of a command that could not do what it was to do."""

NO_READER = 128 + signal.SIGPIPE
"""The exit code of a program whose output nobody reads any more."""

LOOK_FOR_USERS = "look for it: pactown-runner users list"
"""A remedy."""


class Ended(BaseException):
    """The command has ended, with this exit code. No error, and so none of `Exception`.

    Attributes:
        status: the exit code.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@contextlib.contextmanager
def errors_told(status: int, *, as_json: bool) -> Iterator[None]:
    """Turn errors within into messages and the exit code `status`, for a command's whole body.

    Args:
        status: the exit code of a failure.
        as_json: write them to standard output as `{"error": {"code", "message", "remedy"}}`.
    """
    logging.basicConfig(format="pactown-runner: %(message)s", level=logging.WARNING)
    try:
        yield
    except (RunnerError, CgroupError) as error:
        code = error.code if isinstance(error, RunnerError) else "cgroup"
        _tell(code, error.message, error.remedy, as_json=as_json)
    except BrokenPipeError:
        drop_output()
        raise Ended(NO_READER) from None
    except KeyboardInterrupt:
        raise Ended(130) from None
    except OSError as error:
        _tell("os", _describe(error), _remedy(error), as_json=as_json)
    except Exception as error:
        # A bug: whoever reports it needs the traceback, and whoever called us an exit code that means something.
        traceback.print_exc()
        _tell("internal", f"internal error: {error!r}", None, as_json=as_json)
    else:
        return
    raise Ended(status)


def say(line: str) -> None:
    """Write one line for people to standard error; a reader that went away is no reason to fail."""
    with contextlib.suppress(OSError):
        os.write(2, visible(line.encode("utf-8", "backslashreplace") + b"\n"))


def typed(*words: str) -> str:
    """A command of ours, as it is to be typed: on one line, whatever somebody chose for an id."""
    return " ".join(map(_quoted, ("pactown-runner", *words)))


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_escaped, word)) + "'"


def _escaped(character: str) -> str:
    if character.isprintable() and character not in "'\\":
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def look_for_services(user_id: str) -> str:
    """A remedy."""
    return f"see what runs of it: {typed('users', 'show', user_id)}"


def write_json(document: Any) -> None:
    """Write one JSON document to standard output.

    Raises:
        BrokenPipeError: the reader has gone away.
    """
    write_line(json.dumps(document, indent=2 if sys.stdout.isatty() else None, default=str))


def write_line(text: str) -> None:
    """Write a line to standard output, at once.

    Raises:
        BrokenPipeError: the reader has gone away.
    """
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace") + b"\n")
    sys.stdout.buffer.flush()


def drop_output() -> None:
    """Send what is left of our own output nowhere, or the interpreter would complain when it flushes it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)


def _tell(code: str, message: str, remedy: str | None, *, as_json: bool) -> None:
    if as_json:
        write_json({"error": {"code": code, "message": message, "remedy": remedy}})
        return
    say(f"error: {message}")
    if remedy:
        say(f"try: {remedy}")


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def _remedy(error: OSError) -> str | None:
    return "run as root" if isinstance(error, PermissionError) and os.geteuid() != 0 else None
