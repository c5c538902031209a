"""Limits on tenants' disk where nothing enforces them. Where something does: `tests/kernel/test_quota.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cgroups import MAX
from pactown_runner import Settings, Supervisor
from pactown_runner.doctor.host import check_quotas
from pactown_runner.errors import LimitsError
from pactown_runner.purge import Purge
from pactown_runner.quotas import quotas_at
from pactown_runner.registry import Registry, Standing
from pactown_runner.tiers import Tier
from pactown_runner.users import Users
from tests import hostsweep
from tests.supervising import ROOT, USER, Child, leftovers, processes_of, spec

if TYPE_CHECKING:
    from tests.hostguard import Run

pytestmark = pytest.mark.host


@pytest.fixture
def plain(users_base: Path) -> Iterator[Path]:
    """A file system without quotas, whatever this host's others have."""
    disk = users_base / "a disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=711", "disk", disk], check=True)
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def unlimited(settings: Settings, plain: Path) -> Settings:
    return replace(settings, users_base=plain / "homes")


@pytest.mark.parametrize("limit", [{"tenant_disk_max": 1 << 20}, {"tenant_inodes_max": 100, "tenant_disk_max": MAX}])
def test_a_limit_that_would_not_be_enforced_is_an_error_and_makes_nothing(
    unlimited: Settings, test_run: Run, limit: dict[str, Any]
) -> None:
    settings = replace(unlimited, **limit)
    with closing(Registry(settings.state_dir / "registry.db")) as registry:
        with pytest.raises(LimitsError, match="does not hold users to disk quotas: it has none") as caught:
            Users(settings, registry).get_or_create(USER)
        assert "with usrquota; or set neither tenant_disk_max" in str(caught.value.remedy)
        assert registry.users.row(USER) is None
        assert list(hostsweep.accounts(test_run.claim)) == []
        assert not settings.users_base.exists()
        # Whom there is already is not let go on either, but can be looked at and removed.
        user = Users(unlimited, registry).get_or_create(USER)
        limited = Users(settings, registry)
        with pytest.raises(LimitsError):
            limited.get_or_create(USER)
        assert limited.get(USER) == user
        limited.remove_account(limited.begin_removal(USER))
        assert limited.list() == []


async def test_nothing_starts_where_a_limit_would_not_be_enforced(unlimited: Settings) -> None:
    settings = replace(unlimited, tenant_disk_max=1 << 20)
    with pytest.raises(LimitsError, match="does not hold users to disk quotas"):
        await Supervisor(settings=settings).__aenter__()
    # One that takes over no services may be used to look, and to remove.
    async with Supervisor(settings=settings, role="one-shot") as supervisor:
        with pytest.raises(LimitsError):
            await supervisor.start(spec("true"))
        assert await supervisor.users.list() == []
    assert leftovers(settings) == []


def limiting(settings: Settings) -> Settings:
    return replace(settings, tiers=(Tier(name="limited", tenant_disk_max=1 << 20), Tier(name="plain")))


async def test_a_tier_with_a_limit_that_would_not_be_enforced_is_not_given(unlimited: Settings) -> None:
    async with Supervisor(settings=limiting(unlimited)) as supervisor:
        sandbox = await supervisor.start(spec(["sleep", "1000"]))
        await supervisor.users.set_standing(USER, Standing("plain"))
        with pytest.raises(LimitsError, match="does not hold users to disk quotas") as caught:
            await supervisor.users.set_standing(USER, Standing("limited"))
        assert "nor for a tier" in str(caught.value.remedy)
        assert await supervisor.users.standing(USER) == Standing("plain")
        with closing(Registry(unlimited.state_dir / "registry.db")) as registry:
            # One who has it all the same can be blocked, starts nothing in another process, and gets another.
            registry.standings.set(sandbox.user.key, Standing("limited"))
            await supervisor.users.set_standing(USER, Standing("limited", blocked=True))
            assert sandbox.state == "frozen"
            users = Users(limiting(unlimited), registry)
            for refused in (users.check_quotas, lambda: users.get_or_create(USER)):
                with pytest.raises(LimitsError):
                    refused()
            assert users.get_or_create("other")
            await supervisor.users.set_standing(USER, Standing())
            assert sandbox.state == "running"
            registry.standings.set(sandbox.user.key, Standing("limited"))
            await sandbox.stop(0)
            users.check_quotas()  # nothing runs for it
    assert leftovers(unlimited) == []


STARTED = """
async def work(supervisor):
    await supervisor.start(spec(["sleep", "1000"]))
    await say("started")
    await told()
"""


@pytest.mark.parametrize("tier", [None, "limited"])
async def test_what_runs_is_left_as_it_is_where_a_limit_would_not_be_enforced(
    unlimited: Settings, tier: str | None
) -> None:
    """It is not gone on with, and not ended; whoever comes when that is put right goes on with it."""
    with closing(Child(unlimited, STARTED)) as process:
        assert await process.line() == "started"
        await process.killed()
    with closing(Registry(unlimited.state_dir / "registry.db")) as registry:
        (user,) = Users(unlimited, registry).list()
        registry.standings.set(user.key, Standing(tier))
        rows, processes = registry.sandboxes.rows(), set(processes_of(user.linux_uid))
        limited = replace(unlimited, tenant_disk_max=1 << 20) if tier is None else limiting(unlimited)
        for _ in range(2):
            with pytest.raises(LimitsError, match="does not hold users to disk quotas"):
                await Supervisor(settings=limited).__aenter__()
            assert (registry.sandboxes.rows(), set(processes_of(user.linux_uid))) == (rows, processes)
        registry.standings.set(user.key, Standing())
    async with Supervisor(settings=unlimited) as supervisor:
        assert [sandbox.state for sandbox in supervisor.list()] == ["running"]
        assert set(processes_of(user.linux_uid)) == processes
    assert leftovers(unlimited) == []


async def test_a_home_that_was_kept_is_purged_where_a_limit_would_not_be_enforced(unlimited: Settings) -> None:
    async with Supervisor(settings=unlimited) as supervisor:
        user = await supervisor.users.get_or_create(USER)
        await supervisor.users.delete(USER, delete_home=False)
    with Purge(replace(unlimited, tenant_disk_max=1 << 20)) as purge:
        purge.carry_out(purge.plan())
    assert purge.failed == {}
    assert not user.home_dir.exists()


def test_no_limit_needs_no_quotas(unlimited: Settings) -> None:
    settings = replace(unlimited, tenant_disk_max=MAX, tenant_inodes_max=MAX)
    with closing(Registry(settings.state_dir / "registry.db")) as registry:
        users = Users(settings, registry)
        user = users.get_or_create(USER)
        users.remove_account(users.begin_removal(USER))
    with quotas_at(user.home_dir) as quotas:
        assert (quotas.state, quotas.of(user.linux_uid)) == ("off", None)


def test_homes_are_no_links(plain: Path) -> None:
    (plain / "link").symlink_to("/")
    for name in ("link", "nothing"):
        with pytest.raises(OSError), quotas_at(plain / name):
            pass


PLAIN_USER = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
from pactown_runner.config import Settings
from pactown_runner.doctor.host import check_quotas
from pactown_runner.errors import LimitsError
from pactown_runner.registry import Registry, Standing
from pactown_runner.standings import Standings
from pactown_runner.tiers import Tier
from pactown_runner.users import Users
base, uid = Path(sys.argv[1]), int(sys.argv[2])
# Dropped in here: the interpreter may lie where only root can run it.
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
said = []
for limit in (None, "max", 1 << 20):
    settings = Settings(users_base=base / "users", state_dir=base / "state", tenant_disk_max=limit)
    with Registry(settings.state_dir / "registry.db") as registry:
        try:
            user = Users(settings, registry).get_or_create(f"user of {limit}").linux_uid
        except LimitsError as error:
            user = error.remedy
    said.append([user, [finding.status for finding in check_quotas(settings)]])
settings = replace(settings, tenant_disk_max=None, tiers=(Tier(name="limited", tenant_inodes_max=5),))
with Registry(settings.state_dir / "registry.db") as registry:
    users, standings = Users(settings, registry), Standings(settings, registry)
    users.get_or_create("one")
    other = users.get_or_create("other")
    try:
        standings.change(None, other, Standing("limited"))
    except LimitsError as error:
        said.append(error.remedy)
    registry.standings.set(other.key, Standing("limited"))
    try:
        users.get_or_create("other")
    except LimitsError as error:
        said.append(error.remedy)
print(json.dumps(said))
"""


def test_without_root_there_is_no_limit(test_run: Run) -> None:
    uid = test_run.uids[0]
    base = test_run.directory / "plain"
    base.mkdir()
    os.chown(base, uid, uid)
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_USER, str(base), str(uid)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    free, lifted, limited, *of_tier = json.loads(done.stdout)
    assert free == lifted == [uid, []]
    assert limited == ["run as root, or set neither tenant_disk_max nor tenant_inodes_max, nor for a tier", ["fail"]]
    assert of_tier == [limited[0]] * 2
    hostsweep.remove_file(base)


def test_the_doctor_tells_of_quotas(unlimited: Settings) -> None:
    for settings, status, follows in (
        (unlimited, "warn", "one tenant can fill it"),
        (replace(unlimited, tenant_disk_max=MAX), "warn", "one tenant can fill it"),
        (replace(unlimited, tenant_inodes_max=5), "fail", "tenant_inodes_max cannot be enforced"),
        (limiting(unlimited), "fail", "tenant_disk_max of tier limited cannot be enforced"),
    ):
        (finding,) = check_quotas(settings)
        assert (finding.check, finding.status) == ("users_base.quota", status)
        assert finding.message == f"the file system of {unlimited.users_base} has no user quotas: {follows}"
        assert "mkfs.ext4 -O quota" in str(finding.remedy)
