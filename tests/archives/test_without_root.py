"""Exports and imports by a plain user, whose homes are all the same uid's; in a cgroup that was delegated to it."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cgroups import find_mount
from tests.archives.trees import PYTHON, differences, looks
from tests.supervising import ROOT, soon

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host

PLAIN = """
import asyncio, os, sys
base, uid, python, *paths = sys.argv[1:]
sys.path[:0] = paths
# While the interpreter can still read all of itself.
import aiofiles, anyio, anyio._backends._asyncio, base64, concurrent.futures.thread, ctypes, encodings.idna, grp, json
import pwd, sqlite3, structlog, tomllib
import pactown_runner.supervisor, pactown_runner.archives
from pathlib import Path
from pactown_runner import Supervisor
from pactown_runner.archives import export_home, import_home
os.setgroups([]); os.setresgid(*[int(uid)] * 3); os.setresuid(*[int(uid)] * 3)
os.environ["HOME"] = os.environ["XDG_RUNTIME_DIR"] = base

def there_and_back(host, user):
    home = user.home_dir
    (home / "sandboxes/api").mkdir(parents=True)
    (home / "sandboxes/api/main.py").write_text("print()")
    (home / "sandboxes/api/main.py").chmod(0)
    (home / "shut").mkdir()
    (home / "shut/in").write_text("in")
    (home / "again").hardlink_to(home / "shut/in")
    (home / "shut").chmod(0)
    exported = export_home(host, user, Path(base, "archive.tar.gz"), python=Path(python))
    os.rename(home, base + "/before")
    home.mkdir(0o700)
    imported = import_home(host, user, Path(base, "archive.tar.gz"), python=Path(python))
    print(user.linux_uid, exported.entries, exported.files, imported.entries, imported.verified)
    print(home)

async def main():
    async with Supervisor(Path(base, "users")) as supervisor:
        user = await supervisor.users.get_or_create("auth0|1")
        await asyncio.to_thread(there_and_back, supervisor._host, user)

asyncio.run(main())
"""


async def test_a_plain_user_exports_and_imports(test_run: Run, slice_name: str) -> None:
    uid = test_run.uids[0]
    base = test_run.directory / "plain"
    base.mkdir(mode=0o755)
    for name in ("pactown_runner", "cgroups"):
        shutil.copytree(ROOT / name, base / "lib" / name, ignore=shutil.ignore_patterns("__pycache__"))
    os.chown(base, uid, uid)
    delegated = find_mount().path / slice_name
    delegated.mkdir()
    for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        os.chown(delegated / name, uid, uid)
    paths = [str(base / "lib"), sysconfig.get_path("purelib")]
    join = ["sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(delegated)]
    # Started as root, since the interpreter's own files may lie where a user cannot go.
    process = await asyncio.create_subprocess_exec(
        *join, sys.executable, "-c", PLAIN, str(base), str(uid), PYTHON, *paths, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await soon(process.communicate())
    assert process.returncode == 0
    numbers, home = out.decode().splitlines()
    assert numbers == f"{uid} 7 2 7 True"
    before, after = looks(base / "before"), looks(Path(home))
    assert {look.owner for look in after.values()} == {(uid, uid)}
    assert differences(before, after) == []
    shutil.rmtree(base)
