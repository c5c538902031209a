"""Our side of making an environment: one job, and what it said."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from errno import EACCES
from pathlib import Path

from ..errors import FilesError, StartError
from ..host import Host
from ..jobs import Job, Stop, job
from ..launcher import Directory
from ..models import IsolatedUser
from ..venv_layout import Venv, ready_name, venv_of

__all__ = ["ensure_venv"]

_ANSWER_BYTES = 1 << 15
"""More than the other side ever says."""

_NO_PIP = "No module named ensurepip"

_BOOT = """\
import sys
if sys.version_info < (3, 9):
    sys.exit("it needs Python 3.9 or newer, and %s is %s" % (sys.executable, sys.version.split()[0]))
exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())), "pactown", "exec"))
"""
"""The program comes by standard input, and so do its arguments: command lines are for all to see, and the address of an
index or of a package may hold a password."""


def ensure_venv(
    host: Host, user: IsolatedUser, service_id: str, requirements: Sequence[str], *, stop: Stop | None = None
) -> None:
    """See to it that a service's environment is there, complete and linked; blocking, for minutes perhaps.

    Makes the service's directory too. To be called when a start found it missing; that costs a Python's start where
    nothing has to be made. As long as it lasts it keeps its thread, at most `venv_timeout` seconds: a tenant can make
    that come true, so do not let it have many.

    Args:
        stop: lets another thread end it.

    Raises:
        StartError: it cannot be made, with what `pip` or `uv` said (step `venv`); or it was stopped; or the service's
            directory cannot be entered.
        ConfigError: there is no Python that tenants can execute.
        NotFoundError: there is no such user any more.
        StateError: the user is held by an export or import; or what was started could not be ended.
        LimitsError: the default limits cannot be enforced.
    """
    venv = venv_of(host.settings, user, service_id, requirements)
    directories = [Directory(user.home_dir), Directory("sandboxes", make=True), Directory(service_id, make=True)]
    try:
        with job(
            host,
            user,
            (venv.python, "-I", "-S", "-c", _BOOT),
            directories=directories,
            stdin=True,
            stdout=True,
            timeout=host.settings.venv_timeout,
            stop=stop,
        ) as making:
            _begin(making, host, user, venv, requirements)
            said = making.output.read(_ANSWER_BYTES)
            code = making.wait()
            complaint = making.message()
    except FilesError as error:
        raise _failed(error.message) from error
    except StartError as error:
        raise _unstarted(error, venv) from error
    if code != 0:
        raise _failed(_printable(said) or complaint or _how(code))


def _begin(making: Job, host: Host, user: IsolatedUser, venv: Venv, requirements: Sequence[str]) -> None:
    settings = host.settings
    given = {
        "cache": venv.cache,
        "name": venv.name,
        "ready": ready_name(""),
        "sandboxes": f"{user.home_dir}/sandboxes",
        "requirements": list(requirements),
        "index": settings.venv_index,
        "uv": settings.venv_uv,
        "keep": settings.venv_keep,
    }
    text = Path(__file__).with_name("inside.py").read_bytes()
    # If it has ended, its exit code says more.
    with contextlib.suppress(BrokenPipeError):
        making.write(b"%d\n%s%s\n" % (len(text), text, json.dumps(given).encode()))


def _unstarted(error: StartError, venv: Venv) -> StartError:
    if error.step != "execve":
        return error
    remedy = "name a Python that tenants can execute in venv_python" if error.errno == EACCES else error.remedy
    return StartError(f"no environment can be made with {venv.python}: {error.message}", step="venv", remedy=remedy)


def _failed(why: str) -> StartError:
    remedy = "install the Python's ensurepip (Debian: python3-venv), or uv" if _NO_PIP in why else None
    return StartError(f"the environment of its requirements could not be made: {why}", step="venv", remedy=remedy)


def _printable(said: bytes) -> str:
    """The tenant's word."""
    lines = said.decode("utf-8", "replace").splitlines()
    return "; ".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _how(code: int) -> str:
    return f"what was to make it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"
