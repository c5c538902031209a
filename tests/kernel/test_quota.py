"""Limits on tenants' disk, on a disk of this test's own that has user quotas: a loop device."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from errno import EDQUOT
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cgroups import MAX
from pactown_runner import IsolatedUser, Settings, Supervisor
from pactown_runner.archives import ArchiveError
from pactown_runner.doctor.host import check_quotas
from pactown_runner.errors import FilesError, LimitsError
from pactown_runner.quotas import UserQuota, quotas_at
from pactown_runner.registry import Registry, Standing
from pactown_runner.tiers import Tier
from pactown_runner.users import Users
from tests import hostsweep
from tests.kernel.conftest import MIB, Measure, left
from tests.supervising import eventually, line_of, python, soon, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.kernel

DISK_MAX, INODES_MAX = 8 * MIB, 200


@dataclass(frozen=True)
class Disk:
    """A disk, and where it is to be mounted."""

    device: str
    directory: Path

    def mount(self, options: str = "usrquota") -> None:
        subprocess.run(["mount", "-o", options, self.device, self.directory], check=True)

    def unmount(self) -> None:
        if self.directory.is_mount():
            subprocess.run(["umount", self.directory], check=True)


@contextlib.contextmanager
def made_disk(directory: Path, *options: str) -> Iterator[Disk]:
    """An ext4 file system of 128 MiB, not mounted yet; at the end it is not mounted any more."""
    image, mounted = directory / "disk", directory / "mounted"
    mounted.mkdir(parents=True)
    with ExitStack() as stack:
        stack.callback(hostsweep.remove_file, directory)
        with image.open("wb") as file:
            file.truncate(128 * MIB)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", *options, image], check=True)
        made = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True)
        disk = Disk(made.stdout.strip(), mounted)
        stack.callback(lambda: subprocess.run(["losetup", "--detach", disk.device], check=True))
        stack.callback(disk.unmount)
        yield disk


@pytest.fixture(scope="module")
def disk(test_run: Run) -> Iterator[Disk]:
    """A disk with quotas, mounted."""
    with made_disk(test_run.directory / "quota", "-O", "quota", "-E", "quotatype=usrquota") as disk:
        disk.mount()
        disk.directory.chmod(0o711)
        yield disk


def settings_on(disk: Disk, test_run: Run, **options: Any) -> Settings:
    """Homes, registry and logs on this disk; not the FIFOs: they are the tenants', and would count."""
    base = disk.directory / "users"
    return Settings(
        users_base=base,
        state_dir=base / ".state",
        log_dir=base / ".state/log",
        run_dir=test_run.directory / "quota-run",
        cgroup_slice=f"{test_run.name}-quota.slice",
        uid_ranges=(test_run.uids,),
        stop_grace=5.0,
        **options,
    )


def logins_of(settings: Settings) -> list[str]:
    """Of this state alone: other tests of the session have theirs."""
    return [entry.pw_name for entry in pwd.getpwall() if Path(entry.pw_dir).parent == settings.users_base]


@pytest.fixture(scope="module")
def settings(disk: Disk, test_run: Run) -> Iterator[Settings]:
    settings = settings_on(disk, test_run, tenant_disk_max=DISK_MAX, tenant_inodes_max=INODES_MAX)
    yield settings
    hostsweep.remove_file(settings.run_dir)
    for path in list(hostsweep.cgroup_dirs(settings.cgroup_slice.__eq__)):
        hostsweep.remove_cgroup(path)
    for login in logins_of(settings):
        subprocess.run(["userdel", login], check=True)


@pytest.fixture
async def supervisor(settings: Settings) -> AsyncIterator[Supervisor]:
    async with Supervisor(settings=settings) as supervisor:
        yield supervisor
        for user in await supervisor.users.list():
            await supervisor.users.delete(user.saas_user_id)
    assert not left(settings)
    assert [name for name in os.listdir(settings.users_base) if name != ".state"] == []


def quota_of(user: IsolatedUser) -> UserQuota:
    with quotas_at(user.home_dir.parent) as quotas:
        found = quotas.of(user.linux_uid)
    assert found is not None
    return found


WRITE = """
import os
def fill(name):
    fd, count = os.open(name, os.O_WRONLY | os.O_CREAT, 0o600), 0
    try:
        while True:
            count += os.write(fd, b"x" * 65536)
    except OSError as error:
        return count, error.errno
"""
FILL_UP = f"""{WRITE}
print("wrote", *fill("big"), flush=True)
"""
MANY = """
import os
count = 0
try:
    while True:
        os.close(os.open("f%d" % count, os.O_WRONLY | os.O_CREAT, 0o600))
        count += 1
except OSError as error:
    print("made", count, error.errno, flush=True)
"""
# Writes, until a write fails.
NEIGHBOUR = """
import itertools, os
for number in itertools.count():
    with open("file%d" % (number % 2), "wb") as file:
        file.write(b"x" * 65536)
        os.fsync(file.fileno())
    print("ready", flush=True)
"""


async def test_one_who_fills_its_disk_stops_nobody_else(
    supervisor: Supervisor, settings: Settings, measured: Measure
) -> None:
    """B writes to the same disk, and so does the supervisor: the registry, and the logs of A as well."""
    user = await supervisor.users.get_or_create("a")
    other = await supervisor.start(spec(python(NEIGHBOUR), user="b", service="writer"))
    await line_of(other)
    sandbox = await supervisor.start(spec(python(FILL_UP + 'print("x" * 3000000)'), user="a", service="filler"))
    wrote, error = map(int, (await line_of(sandbox, "wrote")).split()[1:])
    outcome = await soon(sandbox.wait())
    assert outcome.ok
    assert error == EDQUOT
    assert DISK_MAX - MIB < wrote <= DISK_MAX
    # Its log alone is nearly half of what it may take.
    log = settings.log_dir / user.linux_username / "filler.jsonl"
    assert log.stat().st_size > 3_000_000
    assert other.state == "running"
    await soon(other.kill())
    stats = await supervisor.users.stats("a")
    assert DISK_MAX - MIB < stats.bytes <= DISK_MAX
    assert (stats.usage.counted, stats.enforced) == ("quota", True)
    assert (stats.usage.disk_max, stats.usage.inodes_max) == (DISK_MAX, INODES_MAX)
    # What is full can be used, though not written to; and emptied.
    assert (await supervisor.run(spec("cat big | wc -c; rm big", user="a", service="filler"))).ok
    assert (await supervisor.users.stats("a")).bytes < MIB
    assert await supervisor.users.get_or_create("c")
    measured("bytes written until EDQUOT", wrote)


async def test_files_are_counted_as_well(supervisor: Supervisor) -> None:
    sandbox = await supervisor.start(spec(python(MANY), user="a"))
    made, error = map(int, (await line_of(sandbox, "made")).split()[1:])
    assert (await soon(sandbox.wait())).ok
    assert error == EDQUOT
    stats = await supervisor.users.stats("a")
    assert stats.entries == INODES_MAX == made + 3  # and the home, `sandboxes`, and what is in that
    # Nothing can be begun for it, and that is said; what there is can be.
    refused = await supervisor.run(spec("true", user="a", service="other"))
    assert refused.reason == "failed-to-start"
    assert "quota" in refused.message.lower()
    assert (await supervisor.run(spec("rm f*", user="a"))).ok
    assert (await supervisor.run(spec("true", user="a", service="other"))).ok


async def test_many_writers_at_once_take_no_more(supervisor: Supervisor) -> None:
    source = f"""{WRITE}
import os
for number in range(8):
    if os.fork() == 0:
        fill("big%d" % number)
        os._exit(0)
for number in range(8):
    os.wait()
"""
    assert (await supervisor.run(spec(python(source), user="a"))).ok
    assert DISK_MAX - MIB < (await supervisor.users.stats("a")).bytes <= DISK_MAX


async def test_stats_are_the_kernels_and_no_walk(
    supervisor: Supervisor, disk: Disk, settings: Settings, measured: Measure
) -> None:
    user = await supervisor.users.get_or_create("a")
    public = disk.directory / "public"
    public.mkdir()
    public.chmod(0o1777)
    try:
        source = f"mkdir deep && head -c 1000000 /dev/zero >deep/file && head -c 2000000 /dev/zero >{public}/file"
        assert (await supervisor.run(spec(source, user="a"))).ok
        found = quota_of(user)
        stats = await supervisor.users.stats("a")
        # A walk of the home does not find the one outside.
        assert (stats.bytes, stats.entries) == (found.bytes, found.inodes)
        assert 3_000_000 < stats.bytes < 3_200_000
        assert stats.entries == 6
        assert stats.usage.sandboxes == 1
        walked = subprocess.run(["du", "-s", "-B1", user.home_dir], check=True, capture_output=True, text=True).stdout
        assert stats.bytes - 2_100_000 < int(walked.split()[0]) < stats.bytes - 1_900_000
        # Though it was asked a moment ago: nothing of this is remembered.
        (public / "file").unlink()
        assert (await supervisor.users.stats("a")).bytes < 1_200_000
        began = time.perf_counter()
        for _ in range(1000):
            quota_of(user)
        measured("µs to ask for one user's usage", (time.perf_counter() - began) * 1e3)
    finally:
        hostsweep.remove_file(public)


async def test_files_put_exports_and_imports_keep_to_it(
    supervisor: Supervisor, settings: Settings, tmp_path: Path
) -> None:
    user = await supervisor.users.get_or_create("a")
    for name, size in (("fits", 5), ("does-not", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(os.urandom(size * MIB))
    with pytest.raises(FilesError, match="Wrote only"):  # tar's words for it
        await supervisor.files.put("a", "api", tmp_path / "does-not")
    await supervisor.files.put("a", "api", tmp_path / "fits")
    # An export takes nothing of it, and a tenant with no disk left can be exported...
    assert (await supervisor.run(spec(python(FILL_UP), user="a", service="api"))).ok
    archive = tmp_path / "archive.tar.gz"
    exported = await supervisor.users.export("a", archive)
    assert exported.files == 2
    inode = user.home_dir.stat().st_ino
    # ...but what was there and what comes do not fit in together: nothing is changed.
    with pytest.raises(ArchiveError, match="quota exceeded"):
        await supervisor.users.import_("a", archive)
    assert user.home_dir.stat().st_ino == inode
    assert (user.home_dir / "sandboxes/api/file").stat().st_size == 5 * MIB
    assert [name for name in os.listdir(settings.users_base) if name.startswith(".fresh")] == []
    assert DISK_MAX - MIB < quota_of(user).bytes <= DISK_MAX
    # For one who has nothing yet it fits.
    await supervisor.users.delete("a")
    assert (await supervisor.users.import_("a", archive)).verified
    assert DISK_MAX - MIB < (await supervisor.users.stats("a")).bytes <= DISK_MAX


async def test_another_limit_holds_from_the_next_supervisor_on(supervisor: Supervisor, settings: Settings) -> None:
    user = await supervisor.users.get_or_create("a")
    limits = []
    for disk_max, inodes_max in ((4 * MIB, None), (None, MAX), (MAX, 50), (5000, None)):
        again = replace(settings, tenant_disk_max=disk_max, tenant_inodes_max=inodes_max)
        async with Supervisor(settings=again) as other:
            assert (await other.run(spec("true", user="a"))).ok
        found = quota_of(user)
        limits.append((found.disk_max, found.inodes_max))
    assert limits == [(4 * MIB, INODES_MAX), (4 * MIB, None), (None, 50), (4096, 50)]
    # What an operator has set is left alone by settings that say nothing...
    subprocess.run(
        ["setquota", "-u", str(user.linux_uid), "100", "200", "0", "0", settings.users_base.parent], check=True
    )
    async with Supervisor(settings=replace(settings, tenant_disk_max=None, tenant_inodes_max=None)) as other:
        assert (await other.run(spec("true", user="a"))).ok
    assert (quota_of(user).disk_max, quota_of(user).inodes_max) == (200 * 1024, None)
    # ...and whoever has the uid next begins without.
    await supervisor.users.delete("a")
    assert quota_of(user) == UserQuota(0, 0, None, None)
    assert await supervisor.users.get_or_create("a") == replace(user, created_at=(await _known(supervisor)).created_at)
    assert (quota_of(user).disk_max, quota_of(user).inodes_max) == (DISK_MAX, INODES_MAX)


async def test_a_tiers_limits_hold_for_those_who_have_it(settings: Settings) -> None:
    """For one who is given it while it runs, who comes back with it, and who is taken over."""
    tiers = (
        Tier(name="small", tenant_disk_max=4 * MIB, tenant_inodes_max=50),
        Tier(name="free", tenant_disk_max=MAX, tenant_inodes_max=MAX),
        Tier(name="plain"),
    )
    with_tiers = replace(settings, tiers=tiers)
    bare = replace(with_tiers, tenant_disk_max=None, tenant_inodes_max=None, on_exit="leave")
    general, small, free = (DISK_MAX, INODES_MAX), (4 * MIB, 50), (None, None)
    async with Supervisor(settings=with_tiers) as supervisor:
        user = await supervisor.users.get_or_create("a")
        sandbox = await supervisor.start(spec(["sleep", "1000"], user="a"))

        def held() -> tuple[int | None, int | None]:
            return quota_of(user).disk_max, quota_of(user).inodes_max

        found = [held()]
        for tier in ("small", "free", "plain", "free", None, "small"):
            await supervisor.users.set_standing("a", Standing(tier))
            found.append(held())
        assert found == [general, small, free, general, free, general, small]
        assert sandbox.state == "running"
        await supervisor.users.delete("a")
        assert held() == free
        assert (await supervisor.run(spec(python(FILL_UP), user="a", service="filler"))).ok
        assert 3 * MIB < quota_of(user).bytes <= 4 * MIB
        assert held() == small
    async with Supervisor(settings=bare) as supervisor:
        # Limited no more, by a tier that says nothing, where the settings say nothing either.
        await supervisor.users.set_standing("a", Standing("plain"))
        assert held() == free
        await supervisor.start(spec(["sleep", "1000"], user="a"))
        with Registry(settings.state_dir / "registry.db") as registry:
            registry.standings.set(user.key, Standing("small"))
    async with Supervisor(settings=bare) as supervisor:
        assert [sandbox.state for sandbox in supervisor.list()] == ["running"]
        assert held() == small
        await supervisor.users.set_standing("a", Standing())
        await supervisor.users.delete("a")


async def test_limits_that_are_enforced_no_more_end_nothing(settings: Settings, test_run: Run) -> None:
    """The supervisor does not start, and says how that is put right; what runs goes on, and is taken over then."""
    with ExitStack() as stack:
        directory = test_run.directory / "off"
        disk = stack.enter_context(made_disk(directory, "-O", "quota", "-E", "quotatype=usrquota"))
        where, state = disk.directory, test_run.directory / "off-state"
        stack.callback(hostsweep.remove_file, state)
        settings = replace(
            settings, users_base=where / "users", state_dir=state, log_dir=state / "log", on_exit="leave"
        )
        disk.mount()
        where.chmod(0o711)
        async with Supervisor(settings=settings) as supervisor:
            sandbox = await supervisor.start(spec(["sleep", "1000"], user="a"))
            pid = sandbox.pid
        subprocess.run(["quotaoff", "-u", where], check=True)
        for _ in range(2):
            with pytest.raises(LimitsError, match="it only counts") as caught:
                await Supervisor(settings=settings).__aenter__()
        assert str(caught.value.remedy).startswith(f"quotaon -u {where};")
        subprocess.run(["quotaon", "-u", where], check=True)
        async with Supervisor(settings=settings) as supervisor:
            assert supervisor.get("a", "api").pid == pid
            assert quota_of(sandbox.user).disk_max == DISK_MAX
            await supervisor.users.delete("a")


async def _known(supervisor: Supervisor) -> IsolatedUser:
    user = await supervisor.users.get("a")
    assert user is not None
    return user


def test_what_only_counts_or_does_not_is_refused_until_the_remedy(settings: Settings, test_run: Run) -> None:
    """Each step is what the error, and the doctor, say."""
    with ExitStack() as stack:
        disk = stack.enter_context(made_disk(test_run.directory / "without"))
        where, source = disk.directory, disk.device
        state = test_run.directory / "state"
        stack.callback(hostsweep.remove_file, state)
        settings = replace(settings, users_base=where / "users", state_dir=state)
        registry = stack.enter_context(Registry(state / "registry.db"))

        def refusal() -> str:
            with pytest.raises(LimitsError, match="does not hold users to disk quotas") as caught:
                Users(settings, registry).get_or_create("a")
            assert logins_of(settings) == []
            (finding,) = check_quotas(settings)
            assert finding.status == "fail"
            assert str(caught.value.remedy).startswith(str(finding.remedy))
            return str(finding.remedy)

        disk.mount("defaults")
        where.chmod(0o711)
        wanted = f"unmount {where}; tune2fs -O quota {source}; then mount {where} with the option usrquota"
        assert refusal().startswith(wanted)
        disk.unmount()
        subprocess.run(["tune2fs", "-O", "quota", source], check=True, capture_output=True)
        disk.mount("defaults")
        assert refusal() == f"quotaon -u {where}; and the option usrquota in /etc/fstab"
        subprocess.run(["quotaon", "-u", where], check=True)
        assert [finding.status for finding in check_quotas(settings)] == ["ok"]
        disk.unmount()
        disk.mount()
        assert [finding.status for finding in check_quotas(settings)] == ["ok"]
        users = Users(settings, registry)
        user = users.get_or_create("a")
        assert quota_of(user).disk_max == DISK_MAX
        users.remove_account(users.begin_removal("a"))
        assert quota_of(user).disk_max is None


async def test_a_tenant_cannot_give_its_files_away(supervisor: Supervisor, settings: Settings) -> None:
    """A project id can be changed by whoever owns the file, an owner by nobody but root."""
    source = """
import errno, os, sys
open("file", "wb").write(b"x" * 1000000)
for call in (lambda: os.chown("file", 0, -1), lambda: os.chown("file", os.getuid() + 1, -1)):
    try:
        call()
    except PermissionError:
        pass
    else:
        sys.exit("given away")
"""
    user = await supervisor.users.get_or_create("a")
    assert (await supervisor.run(spec(python(source), user="a"))).ok
    assert quota_of(user).bytes > 1_000_000


async def test_the_disk_of_one_who_runs_is_counted_while_it_does(supervisor: Supervisor) -> None:
    source = 'open("file", "wb").write(b"x" * 3000000); print("ready", flush=True); import time; time.sleep(1000)'
    sandbox = await supervisor.start(spec(python(source), user="a"))
    await line_of(sandbox)
    found = await asyncio.gather(*(supervisor.users.stats("a") for _ in range(20)))
    assert all(stats.bytes >= 3_000_000 for stats in found)
    await sandbox.kill()


async def test_what_is_taken_over_is_held_to_it(supervisor: Supervisor, settings: Settings) -> None:
    free = replace(settings, tenant_disk_max=None, tenant_inodes_max=None, on_exit="leave")
    async with Supervisor(settings=free) as other:
        user = (await other.start(spec(["sleep", "1000"], user="a"))).user
        assert (quota_of(user).disk_max, quota_of(user).inodes_max) == (None, None)
    await eventually(supervisor.list)
    await soon(supervisor.get("a", "api").started())
    assert (quota_of(user).disk_max, quota_of(user).inodes_max) == (DISK_MAX, INODES_MAX)
