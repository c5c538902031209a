"""The tenant's side: makes an environment, and tidies the cache. Read by the tenant's Python from standard input.

It imports nothing but the standard library. What it says of a failure goes to standard output. Whatever it finds in the
way was put there by the tenant, whose process this is: it need not be robust against that, only against its own
sudden end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

_LOCK = ".lock"
_LINK = ".venv"
_LINE_BYTES = 4096
_SHOWN_LINES = 12
_SHOWN_CHARACTERS = 400
_NO = "\N{MULTIPLICATION SIGN}"
"""Begins what `uv` says of a failure, and `pip` of a package that cannot be built."""
_TELL_VERSION = "import sys; print(sys.prefix != sys.base_prefix, sys.version)"


class FailedError(Exception):
    """What is to be told."""


class Cache:
    """The tenant's environments.

    Args:
        path: the folder that holds them; made if it is missing.
        ready: begins the name of the folder that marks one as complete.
        sandboxes: the folder of the sandboxes, in which links to environments are.
    """

    def __init__(self, path: str, ready: str, sandboxes: str) -> None:
        self.path = path
        self._ready = ready
        self._sandboxes = sandboxes
        os.makedirs(path, 0o700, exist_ok=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all others out; the kernel lets them in when this process ends, however."""
        fd = os.open(os.path.join(self.path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def marked(self, name: str) -> bool:
        """Whether one is complete."""
        return os.path.isdir(self._mark(name))

    def mark(self, name: str) -> None:
        """Say of one that it is complete, when all of it is on the disk: it must not come out of a power cut empty."""
        synced = subprocess.run(["/bin/sync", "--file-system", self.path], capture_output=True, text=True, check=False)
        if synced.returncode != 0:
            raise FailedError(f"it cannot be written to the disk: {synced.stderr.strip()}")
        os.mkdir(self._mark(name))

    def put_aside(self, name: str) -> None:
        """Free a name, for good."""
        with contextlib.suppress(FileNotFoundError):
            os.rename(os.path.join(self.path, name), os.path.join(self.path, f".old-{os.urandom(8).hex()}"))

    def use(self, name: str) -> None:
        """Link the sandbox in whose directory this is to one, which counts as the last used."""
        target = os.path.join(self.path, name)
        os.utime(target)
        try:
            if os.readlink(_LINK) == target:
                return
        except FileNotFoundError:
            pass
        except OSError:
            # Not a link: the tenant's own, or what an imported archive had.
            os.rename(_LINK, f"{_LINK}.replaced-{os.urandom(4).hex()}")
        fresh = f"{_LINK}.new-{os.urandom(8).hex()}"
        os.symlink(target, fresh)
        os.rename(fresh, _LINK)

    def tidy(self, keep: int) -> None:
        """Remove what is not complete, and what no sandbox is linked to but for the last `keep`. Others are locked out,
        so that nobody is at work on any."""
        linked = self._linked()
        spare = []
        for name in os.listdir(self.path):
            if name == _LOCK or name in linked:
                continue
            if self.marked(name):
                spare.append(name)
            else:
                remove(os.path.join(self.path, name))
        spare.sort(key=lambda name: os.stat(os.path.join(self.path, name)).st_mtime_ns, reverse=True)
        for name in spare[keep:]:
            remove(os.path.join(self.path, name))

    def _mark(self, name: str) -> str:
        return os.path.join(self.path, name, self._ready + name)

    def _linked(self) -> set[str]:
        found = set()
        for service in os.listdir(self._sandboxes):
            folder = os.path.join(self._sandboxes, service)
            with contextlib.suppress(OSError):
                where = os.path.normpath(os.path.join(folder, os.readlink(os.path.join(folder, _LINK))))
                if os.path.dirname(where) == os.path.normpath(self.path):
                    found.add(os.path.basename(where))
        return found


class Making:
    """Makes one environment, where it is to stay.

    Args:
        path: where; nothing is there.
        scratch: a folder for what is needed meanwhile: on the same file system, from where `uv` makes hard links, and
            within the tenant's own quota.
        uv: the name or path of `uv`, "" for none.
        index: the URL of the only package index, or None.
    """

    def __init__(self, path: str, scratch: str, uv: str, index: str | None) -> None:
        self._path = path
        self._scratch = scratch
        self._uv = shutil.which(uv) if uv else None
        self._index = index
        self._environment = {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C.UTF-8",
            "HOME": scratch,
            "TMPDIR": scratch,
            "NO_COLOR": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_CACHE_DIR": "1",
            "PIP_NO_INPUT": "1",
            "UV_CACHE_DIR": os.path.join(scratch, "uv"),
            "UV_NO_PROGRESS": "1",
            "UV_PYTHON_DOWNLOADS": "never",
        }
        if index is not None:
            # Else those that the host's configuration names would be asked too.
            self._environment |= {"PIP_EXTRA_INDEX_URL": index, "UV_NO_CONFIG": "1"}

    def make(self, requirements: list[str]) -> None:
        """Make it; raises `FailedError` with what was said."""
        wanted = os.path.join(self._scratch, "requirements.txt")
        with open(wanted, "w", encoding="utf-8") as file:
            # Here and not in the arguments, which are for all to see.
            file.writelines([f"--index-url {self._index}\n"] if self._index is not None else [])
            file.writelines(f"{line}\n" for line in requirements)
        python = python_of(self._path)
        if self._uv is not None:
            self._run(self._uv, "venv", "--quiet", "--python", sys.executable, self._path)
            self._run(self._uv, "pip", "install", "--quiet", "--python", python, "--requirement", wanted)
        else:
            # `venv` would keep to itself why its `ensurepip` failed.
            self._run(sys.executable, "-I", "-m", "venv", "--without-pip", self._path)
            self._run(python, "-I", "-m", "ensurepip", "--default-pip")
            self._run(python, "-I", "-m", "pip", "install", "--quiet", "--requirement", wanted)

    def _run(self, *argv: str) -> None:
        with subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self._scratch,
            env=self._environment,
        ) as process:
            assert process.stdout is not None
            lines = telling(iter(partial(process.stdout.readline, _LINE_BYTES), b""))
        if code := process.returncode:
            end = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
            raise FailedError("\n".join([f"{os.path.basename(argv[0])} {end}", *lines]))


def telling(said: Iterator[bytes]) -> list[str]:
    """Read all that a program says, and return what tells why it failed: the first error with what follows it, or else
    the end."""
    last: deque[str] = deque(maxlen=_SHOWN_LINES)
    telling = False
    for line in said:
        if text := line.decode("utf-8", "replace").strip()[:_SHOWN_CHARACTERS]:
            if not telling and ("error" in text.lower() or text.startswith(_NO)):
                telling = True
                last.clear()
            if not telling or len(last) < _SHOWN_LINES:
                last.append(text)
    return list(last)


def python_of(path: str) -> str:
    """The interpreter of the environment in `path`."""
    return os.path.join(path, "bin", "python")


def works(path: str) -> bool:
    """Whether the interpreter of the environment in `path` runs, is this very one, and knows of the environment."""
    try:
        told = subprocess.run(
            [python_of(path), "-I", "-c", _TELL_VERSION],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return False
    return told.stdout == f"True {sys.version}\n"


def remove(path: str) -> None:
    """Remove a file or folder as far as possible: what stays is tried again by the next one who tidies."""
    if os.path.islink(path) or not os.path.isdir(path):
        with contextlib.suppress(OSError):
            os.unlink(path)
        return
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
        for folder, names, _ in os.walk(path):
            for name in names:
                if not os.path.islink(inner := os.path.join(folder, name)):
                    os.chmod(inner, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def provide(cache: Cache, given: dict[str, Any]) -> None:
    """See to it that the environment that is asked for is there, complete and linked."""
    name, keep = given["name"], given["keep"]
    with cache.locked():
        if not (cache.marked(name) and works(os.path.join(cache.path, name))):
            cache.put_aside(name)
            cache.tidy(keep)
            make(cache, given)
        cache.use(name)
        cache.tidy(keep)


def make(cache: Cache, given: dict[str, Any]) -> None:
    """Make it, or leave nothing."""
    path = os.path.join(cache.path, given["name"])
    scratch = tempfile.mkdtemp(prefix=".making-", dir=cache.path)
    try:
        Making(path, scratch, given["uv"], given["index"]).make(given["requirements"])
        if not works(path):
            raise FailedError(f"its Python does not work as {sys.executable} does")
        cache.mark(given["name"])
    except BaseException:
        remove(path)
        raise
    finally:
        remove(scratch)


def serve(given: dict[str, Any]) -> int:
    """Do what is asked for; 0 if that worked."""
    try:
        provide(Cache(given["cache"], given["ready"], given["sandboxes"]), given)
    except (FailedError, OSError) as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(serve(json.loads(sys.stdin.buffer.readline())))
