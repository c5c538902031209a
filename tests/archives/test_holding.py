"""What the tenant's sandboxes are while its home is read or replaced: still, and afterwards what they were."""

from __future__ import annotations

import asyncio
import re
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pactown_runner import Sandbox
from pactown_runner.archives import ArchiveError, export_home, held, import_home
from pactown_runner.errors import StateError
from pactown_runner.host import Host
from pactown_runner.models import IsolatedUser, State
from pactown_runner.supervisor import Supervisor
from tests.archives.trees import as_tenant
from tests.supervising import USER, eventually, line_of, python, spec

pytestmark = pytest.mark.host

WRITER = """
number = 0
while True:
    number += 1
    for name in range(400):
        with open("../file%03d" % name, "w") as file:
            file.write(str(number))
    if number == 1:
        print("ready", flush=True)
"""
"""At any moment some files hold a number, and all behind them the one before."""


async def start_writer(supervisor: Supervisor) -> Sandbox:
    sandbox = await supervisor.start(spec(python(WRITER)))
    await line_of(sandbox)
    return sandbox


async def goes_on(user: IsolatedUser, number: int) -> None:
    """Wait until the writer has got further than this."""
    await eventually(lambda: int((user.home_dir / "sandboxes/file399").read_text() or 0) > number + 1)


async def in_thread(call: Callable[[], object]) -> object:
    return await asyncio.to_thread(call)


def numbers_in(archive: Path) -> list[int]:
    found = {}
    with tarfile.open(archive) as tar:
        for info in tar:
            if "/file" in info.name:
                file = tar.extractfile(info)
                assert file is not None
                found[info.name] = int(file.read() or b"-1")
    return [found[name] for name in sorted(found)]


async def test_what_runs_is_frozen_meanwhile(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path
) -> None:
    sandbox = await start_writer(supervisor)
    for _ in range(5):
        await in_thread(partial(export_home, host, user, archive))
        numbers = [number for number in numbers_in(archive) if number != -1]
        assert len(numbers) >= 399
        # The one that is being written may be empty.
        assert numbers == sorted(numbers, reverse=True)
        assert numbers[0] - numbers[-1] <= 1
        await goes_on(user, numbers[-1])
    assert sandbox.state == State.RUNNING


async def test_what_was_frozen_stays_so(supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path) -> None:
    sandbox = await start_writer(supervisor)
    await sandbox.freeze()
    await in_thread(partial(export_home, host, user, archive))
    with host.tree.open_scope(f"pactown-{user.key}.slice", "api.scope") as scope:
        assert scope.frozen()
    await sandbox.thaw()


async def test_what_is_to_be_stopped_must_be(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path
) -> None:
    sandbox = await start_writer(supervisor)
    inode = user.home_dir.stat().st_ino
    with pytest.raises(StateError, match="in use: api of user"):
        await in_thread(partial(export_home, host, user, archive, while_="stopped"))
    await in_thread(partial(export_home, host, user, archive))
    with pytest.raises(StateError, match="in use: api of user"):
        await in_thread(partial(import_home, host, user, archive))
    assert user.home_dir.stat().st_ino == inode
    assert sandbox.state == State.RUNNING
    await sandbox.stop(0)
    await in_thread(partial(export_home, host, user, archive, while_="stopped"))
    await in_thread(partial(import_home, host, user, archive))
    assert user.home_dir.stat().st_ino != inode


@pytest.mark.parametrize("what", ["thaws", "stops", "starts"])
async def test_an_export_that_somebody_stirs_is_none(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path, what: str
) -> None:
    as_tenant(user, 'import os; open("big", "wb").write(os.urandom(4 << 20))')
    sandbox = await start_writer(supervisor)
    loop = asyncio.get_running_loop()
    stirred: list[str] = []

    async def stir() -> None:
        if what == "stops":
            await sandbox.stop(0)
        elif what == "starts":
            await supervisor.start(spec(["/bin/sleep", "100"], service="another"))
        else:
            with host.tree.open_scope(f"pactown-{user.key}.slice", "api.scope") as scope:
                scope.thaw()

    def on_progress(done: int, total: int | None) -> None:
        if not stirred:
            try:
                asyncio.run_coroutine_threadsafe(stir(), loop).result(20)
                stirred.append("done")
            except StateError:
                stirred.append("refused")

    export = partial(export_home, host, user, archive, progress=on_progress)
    (ended,) = await asyncio.gather(in_thread(export), return_exceptions=True)
    if stirred == ["done"]:
        # Perhaps it saw a file change under it before it looked at who ran.
        assert isinstance(ended, StateError | ArchiveError)
        assert re.search("ran or ended meanwhile|while it was read", str(ended))
    assert archive.exists() == (stirred == ["refused"])


async def test_one_at_a_time(supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path) -> None:
    def both() -> None:
        export_home(host, user, archive)
        with held(host, user) as hold:
            assert {row.service_id for row in host.registry.rows()} == {"_hold"}
            for call in (export_home, import_home):
                with pytest.raises(StateError, match="exported or imported"):
                    call(host, user, archive)
            with pytest.raises(StateError, match="something runs for it"):
                host.users.begin_removal(USER)
            hold.must_be_idle()
        import_home(host, user, archive)

    await in_thread(both)


async def test_an_export_that_fails_lets_go(
    supervisor: Supervisor, host: Host, user: IsolatedUser, archive: Path
) -> None:
    await start_writer(supervisor)
    with pytest.raises(ArchiveError):
        await in_thread(partial(export_home, host, user, archive, python=Path("/bin/false")))
    await goes_on(user, int((user.home_dir / "sandboxes/file399").read_text() or 0))
