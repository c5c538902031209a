"""Files whose content comes from a descriptor, or goes into one, at somebody else's pace."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

import pytest

from pactown_runner.config import Settings
from pactown_runner.errors import FilesError, NotFoundError, SpecError
from pactown_runner.homes import SandboxFiles, Transfer
from pactown_runner.supervisor import Supervisor
from tests.files.helpers import SERVICE, USER
from tests.supervising import Start, eventually, processes_of, soon

pytestmark = pytest.mark.host
pytest_plugins = ("tests.supervising",)


@contextmanager
def pipe() -> Iterator[tuple[int, FileIO]]:
    """The reading end of a pipe, and the writing end."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        with FileIO(writing, "wb") as file:
            yield reading, file
    finally:
        os.close(reading)


async def fed(content: bytes, work: Awaitable[Transfer], writing: FileIO) -> Transfer:
    """Write all of this while the other end is read."""

    def write() -> None:
        with writing:
            view = memoryview(content)
            while view:
                view = view[writing.write(view) :]

    return (await soon(asyncio.gather(work, asyncio.to_thread(write))))[0]


async def inside_of(supervisor: Supervisor, user_id: str = USER) -> Path:
    return (await supervisor.users.get_or_create(user_id)).home_dir / "sandboxes" / SERVICE


async def test_a_file_comes_back_as_it_went(supervisor: Supervisor, files: SandboxFiles) -> None:
    for name, content in (("empty", b""), ("a/b c", os.urandom(3_000_001))):
        with pipe() as (reading, writing):
            put = await fed(content, files.put_stream(USER, SERVICE, reading, name), writing)
        assert put == Transfer(1, len(content))
        sizes: list[int] = []
        with pipe() as (reading, writing):
            getting = asyncio.create_task(
                files.read_stream(USER, SERVICE, name, writing.fileno(), on_size=sizes.append)
            )
            got = b""
            while len(got) < len(content):
                got += await soon(asyncio.to_thread(os.read, reading, 1 << 16))
            await soon(getting)
        assert (got, sizes) == (content, [len(content)])
    user = await supervisor.users.get(USER)
    assert user is not None
    found = (await inside_of(supervisor) / "a/b c").stat()
    assert (found.st_uid, found.st_mode & 0o7777) == (user.linux_uid, 0o600)


async def test_what_cannot_be_put_leaves_what_was_there(supervisor: Supervisor, files: SandboxFiles) -> None:
    await files.put(USER, SERVICE, b"old", "folder/f")
    for target, error in (
        ("folder", FilesError),
        ("../f", SpecError),
        ("folder/", SpecError),
        ("folder/f/g", FilesError),
    ):
        with pipe() as (reading, writing), pytest.raises(error):
            await fed(b"new", files.put_stream(USER, SERVICE, reading, target), writing)
    with pipe() as (reading, writing):
        writing.write(b"new")
        putting = asyncio.create_task(files.put_stream(USER, SERVICE, reading, "folder/f"))
        folder = await inside_of(supervisor) / "folder"
        await eventually(lambda: sum(path.stat().st_size for path in folder.iterdir()) == len(b"oldnew"))
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await soon(putting)
    assert [path.name for path in folder.iterdir()] == ["f"]
    assert await files.read(USER, SERVICE, "folder/f") == b"old"


DYING = """
async def work(supervisor):
    reading, writing = os.pipe()
    os.write(writing, b"begun")
    await supervisor.files.put_stream("auth0|files", "api", reading, "f")
"""


async def test_a_supervisor_that_dies_is_not_taken_for_the_end_of_the_content(settings: Settings, child: Start) -> None:
    dying = child(DYING, role="one-shot")
    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        inside = await inside_of(supervisor)
        await eventually(lambda: inside.exists() and any(path.stat().st_size == 5 for path in inside.iterdir()))
        uid = (await supervisor.users.get_or_create(USER)).linux_uid
        (pid,) = processes_of(uid)
        await dying.killed()
        # It sees the end of the pipe, or is ended by the next supervisor: who comes first.
        await eventually(lambda: pid not in processes_of(uid))
        assert not (inside / "f").exists()


async def test_what_cannot_be_read_to_its_end_does_not_look_whole(supervisor: Supervisor, files: SandboxFiles) -> None:
    with pipe() as (_, writing):
        for path, error in (("none", NotFoundError), ("..", SpecError)):
            await inside_of(supervisor)
            with pytest.raises(error):
                await files.read_stream(USER, SERVICE, path, writing.fileno(), on_size=lambda _: None)
    content = os.urandom(3 << 20)
    await files.put(USER, SERVICE, content, "f")
    uid = (await supervisor.users.get_or_create(USER)).linux_uid
    with pipe() as (reading, writing):
        getting = asyncio.create_task(files.read_stream(USER, SERVICE, "f", writing.fileno(), on_size=lambda _: None))
        got = await soon(asyncio.to_thread(os.read, reading, 1))
        for pid in processes_of(uid):
            os.kill(pid, signal.SIGKILL)
        while not getting.done():
            os.set_blocking(reading, False)
            try:
                got += os.read(reading, 1 << 16)
            except BlockingIOError:
                await asyncio.sleep(0.005)
        with pytest.raises(FilesError):
            await getting
    assert len(got) < len(content)
    assert content.startswith(got)
