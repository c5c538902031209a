"""A tenant that swaps files and links while its home is read or written: what is root's stays root's.

The tenant's racer runs outside the slice, where no hold freezes it: nobody is to rely on the freezing for this.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pactown_runner.archives import export_home, import_home
from pactown_runner.errors import RunnerError
from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser
from tests.archives.trees import PYTHON, as_tenant
from tests.files.helpers import until

TRIES = int(os.environ.get("PACTOWN_ARCHIVE_RACES", "40"))

pytestmark = [pytest.mark.host, pytest.mark.deadline(120 + TRIES)]

RACER = """
import os, shutil, sys
victim, home = sys.argv[1], sys.argv[2] + "/sandboxes/api"
names = ["f%d" % number for number in range(20)]

def fill(where):
    os.makedirs(where, exist_ok=True)
    for name in names:
        with open(where + "/" + name, "w") as file:
            file.write("tenant's")
        os.makedirs(where + "/d" + name, exist_ok=True)
        with open(where + "/d" + name + "/canary", "w") as file:
            file.write("tenant's")

def swap(where):
    for name in names:
        # A file for a link to root's, a folder for a link to the folder that it is in.
        for name, target in ((name, victim + "/canary"), ("d" + name, victim)):
            path = where + "/" + name
            try:
                os.rename(path, path + "~")
                os.symlink(target, path)
                os.unlink(path)
                os.rename(path + "~", path)
            except OSError:
                # Somebody has made another meanwhile.
                shutil.rmtree(path + "~", ignore_errors=True)

fill(home)
open("ready", "w").close()
while True:
    for _ in range(10):
        swap(home)
    # The new home while it is being made: whoever writes there has it for its folder, and the same uid.
    for pid in os.listdir("/proc"):
        try:
            where = os.readlink("/proc/" + pid + "/cwd") if pid.isdigit() else ""
            while "/.fresh-" in where and os.path.exists("/proc/" + pid):
                swap(where + "/sandboxes/api")
        except OSError:
            pass
"""


@dataclass(frozen=True)
class Victim:
    """A folder of root's that everybody may look into, with a file in it that nobody may read or write."""

    path: Path

    @property
    def canary(self) -> Path:
        return self.path / "canary"

    def state(self) -> tuple[object, ...]:
        status = [path.lstat() for path in (self.path, self.canary)]
        marks = [(found.st_mode, found.st_uid, found.st_ino, found.st_nlink, found.st_ctime_ns) for found in status]
        return (*marks, self.canary.read_text(), sorted(os.listdir(self.path)))


@pytest.fixture
def victim(users_base: Path) -> Victim:
    victim = Victim(users_base / "victim")
    victim.path.mkdir()
    victim.canary.write_text("root's own")
    victim.canary.chmod(0o600)
    victim.path.chmod(0o755)
    return victim


@pytest.fixture
def racer(user: IsolatedUser, victim: Victim) -> Iterator[None]:
    process = subprocess.Popen(
        [PYTHON, "-I", "-S", "-c", RACER, str(victim.path), str(user.home_dir)],
        user=user.linux_uid,
        group=user.linux_gid,
        extra_groups=[],
        cwd=user.home_dir,
        start_new_session=True,
    )
    try:
        until((user.home_dir / "ready").exists)
        yield
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def leaked(archive: Path) -> bool:
    with contextlib.suppress(OSError, EOFError):
        return b"root's own" in gzip.decompress(archive.read_bytes())
    return False


@pytest.mark.usefixtures("racer")
def test_exports_raced_by_the_tenant(host: Host, user: IsolatedUser, victim: Victim, archive: Path) -> None:
    before, made = victim.state(), 0
    for _ in range(TRIES):
        # It may well fail, as what is read changes; that is the tenant's own loss.
        with contextlib.suppress(RunnerError):
            export_home(host, user, archive)
            made += 1
        assert not leaked(archive)
        assert victim.state() == before
    assert made > 0


@pytest.mark.usefixtures("racer")
def test_the_race_catches_an_export_by_root(user: IsolatedUser, victim: Victim, archive: Path) -> None:
    while not leaked(archive):  # up to the deadline
        with contextlib.suppress(OSError, tarfile.TarError), tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            tar.add(user.home_dir, arcname=user.linux_username)


FILL = """
import os
os.makedirs("sandboxes/api")
for number in range(20):
    os.mkdir("sandboxes/api/df%d" % number)
    for name in ("f%d", "df%d/canary"):
        with open("sandboxes/api/" + name % number, "w") as file:
            file.write("archived")
"""


@pytest.fixture
def honest(host: Host, user: IsolatedUser, archive: Path) -> Path:
    as_tenant(user, FILL)
    export_home(host, user, archive)
    return archive


def test_imports_raced_by_the_tenant(honest: Path, racer: None, host: Host, user: IsolatedUser, victim: Victim) -> None:
    before, made = victim.state(), 0
    for _ in range(TRIES):
        with contextlib.suppress(RunnerError):
            import_home(host, user, honest)
            made += 1
        assert victim.state() == before
    assert made > 0


def test_the_race_catches_an_import_by_root(honest: Path, racer: None, user: IsolatedUser, victim: Victim) -> None:
    before = victim.state()
    while victim.state() == before:  # up to the deadline
        with contextlib.suppress(OSError, tarfile.TarError), tarfile.open(honest) as tar:
            # As the original did: over the home that is there, and then given away.
            tar.extractall(user.home_dir.parent)
            os.chown(user.home_dir, user.linux_uid, user.linux_gid)
            for folder, names, files in os.walk(user.home_dir):
                for name in names + files:
                    path = os.path.join(folder, name)
                    if not os.path.islink(path):
                        os.chown(path, user.linux_uid, user.linux_gid)
