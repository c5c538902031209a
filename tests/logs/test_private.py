"""Logs, spools and FIFOs are root's alone: what a tenant tries to do to them from its own account."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pactown_runner.logs import LogPaths
from pactown_runner.logs.paths import put_aside
from tests.hostguard import Run
from tests.logs.conftest import MakePump, Write, limited, records, soon, written

pytestmark = pytest.mark.host

TRY = """if 1:
    import json, os, sys
    from pathlib import Path
    done = []
    def attempt(what, *args):
        try:
            what(*args)
            done.append(f"{getattr(what, '__qualname__', what)} {args[0]}")
        except PermissionError:
            pass
    for path in map(Path, json.loads(sys.argv[1])):
        attempt(os.listdir, path)
        attempt(os.stat, path / "x")
        attempt(os.chdir, path)
        attempt(os.chmod, path, 0o777)
        attempt(os.rename, path, str(path) + ".mine")
        attempt(os.mkdir, path / "mine")
        attempt(os.symlink, "/etc/passwd", path / "mine.jsonl")
    for path in map(Path, json.loads(sys.argv[2])):
        attempt(os.stat, path)
        for flags in (os.O_RDONLY, os.O_WRONLY | os.O_NONBLOCK, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC):
            attempt(os.open, path, flags)
        attempt(os.unlink, path)
        attempt(os.truncate, path, 0)
        attempt(os.link, path, "/tmp/" + path.name)
    attempt(os.listdir, Path(sys.argv[3]))
    print(json.dumps(done))
"""


@pytest.fixture
def paths(users_base: Path) -> LogPaths:
    """Where a tenant can pass through, so that it is the log directory itself that it has to be kept out of."""
    (users_base / "open").mkdir(mode=0o755)
    return LogPaths(users_base / "log", users_base / "run", "aabbccdd")


def attempts(uid: int, directories: list[str], names: list[str], honest: Path) -> Any:
    words = ["/usr/bin/python3", "-S", "-E", "-c", TRY, json.dumps(directories), json.dumps(names), str(honest)]
    return json.loads(
        subprocess.run(words, user=uid, group=uid, extra_groups=[], check=True, capture_output=True).stdout
    )


async def test_a_tenant_can_neither_list_nor_read_nor_write_its_logs(
    make_pump: MakePump, write: Write, paths: LogPaths, users_base: Path, test_run: Run
) -> None:
    uid = test_run.uids[0]
    paths.prepare()
    pump = make_pump(uid=uid, gid=uid, tenant=limited(paths, rotate_bytes=1))
    pump.create()
    pump.start()
    program = await write(pump, "cat", stdin=subprocess.PIPE, user=uid, group=uid, extra_groups=[])
    assert program.stdin is not None
    for count, line in enumerate((b"one\n", b"two\n"), 1):
        program.stdin.write(line)
        await soon(written(pump, lambda: pump.written == count))  # noqa: B023 - awaited at once
    directories = [str(paths.log_dir), paths.tenant_dir, paths.aside_dir, paths.spool_dir, paths.fifo_dir]
    logs = [paths.log("api"), put_aside(paths.log("api")) + ".1"]
    names = [*logs, *paths.spools("api", "r1"), *paths.fifos("api", "r1")]
    assert all(os.path.exists(name) for name in names)
    # What is not refused is what any directory of the host allows.
    assert attempts(uid, directories, names, users_base / "open") == [f"listdir {users_base / 'open'}"]
    assert [r.raw for r in await records(paths)] == [b"one", b"two"]
    for path in [*directories, *logs]:
        assert (os.stat(path).st_uid, os.stat(path).st_mode & 0o077) == (0, 0)
