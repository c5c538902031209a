"""`doctor`: findings from facts, and the truth about this very host."""

from __future__ import annotations

import json
import os
import pty
from dataclasses import replace
from pathlib import Path

import pytest

from cgroups import Mount
from pactown_runner import IsolationReport, Settings
from pactown_runner.doctor import Finding
from pactown_runner.doctor.host import check_accounts, check_directories, check_users_base
from pactown_runner.doctor.kernel import (
    check_controllers,
    check_kernel,
    check_mount,
    check_proc,
    check_sysctls,
    mount_options,
)
from pactown_runner.doctor.place import check_identity
from pactown_runner.doctor.probe import judge
from tests import hostsweep
from tests.cli.conftest import Cli, Start
from tests.lanes import lacks_for_kernel

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "33 30 0:29 / /sys/fs/cgroup/memory rw shared:10 - cgroup cgroup rw,memory\n"
    "34 30 0:30 / /sys/fs/cgroup/unified rw shared:11 - cgroup2 cgroup2 rw\n"
)
REPORT = IsolationReport(
    mode="root",
    uid=(9, 9, 9),
    gid=(9, 9, 9),
    groups=(),
    capabilities={"effective": 0},
    no_new_privs=True,
    root_regainable=False,
    cgroup="/x",
    placement="born",
    keyring=True,
)


def statuses(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


@pytest.mark.parametrize(
    ("release", "status"),
    [("5.13.19", "fail"), ("4.19.0-5.14", "fail"), ("5.14.0", "ok"), ("6.1.0-28-amd64", "ok"), ("none", "warn")],
)
def test_kernel_version(release: str, status: str) -> None:
    assert statuses(list(check_kernel(release, "x86_64"))) == {"kernel": status}


def test_unknown_machine() -> None:
    assert statuses(list(check_kernel("6.1.0", "riscv64")))["machine"] == "fail"


@pytest.mark.parametrize(
    ("mountinfo", "status", "word"),
    [
        (V2, "ok", "cgroup v2 alone"),
        (HYBRID, "warn", "v1 holds memory"),
        (HYBRID.splitlines()[0], "fail", "no cgroup v2"),
        ("", "fail", "no cgroup v2"),
        (V2.replace("rw", "ro"), "fail", "read-only"),
    ],
)
def test_mount(mountinfo: str, status: str, word: str) -> None:
    _, (finding,) = check_mount(mountinfo)
    assert finding.status == status
    assert word in finding.message
    assert (finding.remedy is None) == (status == "ok")


def test_controllers_tell_which_limits_work() -> None:
    mount = Mount(Path("/sys/fs/cgroup"))
    found = list(check_controllers(mount, frozenset({"memory", "pids", "cpuset"})))
    assert statuses(found) == {
        "limits.memory": "ok",
        "limits.cpu": "fail",
        "limits.pids": "ok",
        "limits.io": "warn",
        "limits.cpuset": "ok",
    }


def test_controllers_that_v1_holds() -> None:
    mount, _ = check_mount(HYBRID)
    assert mount is not None
    memory = next(f for f in check_controllers(mount, frozenset()) if f.check == "limits.memory")
    assert memory.status == "fail"
    assert "cannot be enforced (cgroup v1 holds the controller)" in memory.message
    assert memory.remedy is not None
    assert "systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=all" in memory.remedy


def test_mount_options_are_those_of_the_nearest_mount() -> None:
    text = (
        "1 0 8:1 / / rw - ext4 /dev/a rw,errors=remount-ro\n"
        "2 1 8:2 / /home rw,noexec - ext4 /dev/b rw\n"
        "3 1 8:3 / /home\\040x rw,nosuid - ext4 /dev/c rw\n"
    )
    assert "noexec" in mount_options("/home/pactown_users", text)
    assert "nosuid" in mount_options("/home x/y", text)
    assert not {"noexec", "nosuid"} & mount_options("/homes", text)


def test_proc() -> None:
    assert statuses(list(check_proc(frozenset({"rw", "hidepid=invisible"})))) == {"proc.hidepid": "ok"}
    assert statuses(list(check_proc(frozenset({"rw"})))) == {"proc.hidepid": "warn"}


def test_sysctls(tmp_path: Path) -> None:
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs/protected_symlinks").write_text("0\n")
    (tmp_path / "fs/protected_hardlinks").write_text("1\n")
    found = list(check_sysctls(tmp_path))
    assert statuses(found) == {"fs.protected_symlinks": "warn", "fs.protected_hardlinks": "ok"}
    assert found[0].remedy == "sysctl -w fs.protected_symlinks=1"


def test_identity() -> None:
    assert check_identity(0).status == "ok"
    assert check_identity(1000).status == "warn"


def test_report_of_a_good_start() -> None:
    assert set(statuses(list(judge(REPORT, 9))).values()) == {"ok"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"uid": (9, 9, 0)}, "uids"),
        ({"groups": (0,)}, "groups"),
        ({"capabilities": {"effective": 1}}, "effective"),
        ({"no_new_privs": False}, "execve"),
        ({"root_regainable": True}, "root"),
        ({"placement": "none"}, "no cgroup"),
    ],
)
def test_report_of_a_bad_start_fails(change: dict[str, object], word: str) -> None:
    first = next(judge(replace(REPORT, **change), 9))  # type: ignore[arg-type]  # the point is that any may change
    assert (first.check, first.status) == ("launcher.works", "fail")
    assert word in first.message


def test_joining_and_refused_keyrings_are_warnings() -> None:
    found = statuses(list(judge(replace(REPORT, placement="joined", keyring=False), 9)))
    assert found == {"launcher.works": "ok", "launcher.placement": "warn", "launcher.keyring": "warn"}


def test_directories_that_let_others_in(tmp_path: Path) -> None:
    settings = Settings(users_base=tmp_path, state_dir=tmp_path / "a", log_dir=tmp_path / "b", run_dir=tmp_path / "c")
    settings.state_dir.mkdir(mode=0o700)
    settings.log_dir.mkdir()
    settings.log_dir.chmod(0o755)
    found = list(check_directories(settings))
    assert statuses(found) == {"state_dir": "ok", "log_dir": "fail", "run_dir": "ok"}
    assert found[1].remedy is not None
    assert f"chmod 700 {settings.log_dir}" in found[1].remedy
    assert not settings.run_dir.exists()


def test_users_base(users_base: Path) -> None:
    def look(text: str = "") -> dict[str, str]:
        return statuses(list(check_users_base(users_base, text)))

    assert look() == {"users_base": "ok"}
    assert look("1 0 8:1 / / rw,noexec,nosuid - ext4 /dev/a rw\n")["users_base.mount"] in ("warn", "ok")
    users_base.chmod(0o755)
    assert look() == {"users_base": "warn"}
    users_base.chmod(0o777)
    assert look() == {"users_base": "fail"}


@pytest.mark.host
def test_accounts(settings: Settings, tmp_path: Path) -> None:
    assert statuses(list(check_accounts(settings))) == {"accounts.tools": "ok", "accounts.uids": "ok"}
    few = replace(settings, uid_ranges=((settings.uid_ranges[0][0],) * 2,))
    assert statuses(list(check_accounts(few)))["accounts.uids"] == "warn"
    root_only = replace(settings, uid_ranges=((1, 1),))  # daemon's
    assert statuses(list(check_accounts(root_only)))["accounts.uids"] == "fail"
    found = statuses(list(check_accounts(replace(settings, uid_ranges=((60001, 60100),)), homed=tmp_path)))
    assert found["accounts.homed"] == "ok"
    assert found["accounts.uids"] == "fail"
    assert statuses(list(check_accounts(settings, tool_path=str(tmp_path))))["accounts.tools"] == "fail"


@pytest.mark.host
def test_this_host(cli: Cli, settings: Settings) -> None:
    done = cli("doctor", "--json")
    document = json.loads(done.stdout)
    assert done.stderr == b""
    assert done.returncode == (0 if document["ok"] else 1)
    assert document["ok"] == all(finding["status"] != "fail" for finding in document["findings"])
    found = {finding["check"]: finding["status"] for finding in document["findings"]}
    assert {found[check] for check in ("kernel", "launcher", "launcher.works", "cgroup.kill", "accounts.tools")} == {
        "ok"
    }
    limits = {found[f"limits.{name}"] for name in ("memory", "cpu", "pids")}
    assert limits == ({"ok"} if lacks_for_kernel() is None else {"fail"})
    # It has changed nothing.
    assert os.listdir(settings.users_base) == []
    stem = settings.cgroup_slice.removesuffix(".slice")
    assert not list(hostsweep.cgroup_dirs(lambda name: name.startswith(stem)))


@pytest.mark.host
def test_a_cgroup_that_was_killed_once_is_known(start: Start, slice_name: str) -> None:
    used = hostsweep.cgroup2_mounts()[0] / slice_name
    used.mkdir()
    (used / "cgroup.kill").write_text("1")
    process = start("doctor", "--json", preexec_fn=lambda: (used / "cgroup.procs").write_text("0"))
    assert process.stdout is not None
    found = {finding["check"]: finding for finding in json.load(process.stdout)["findings"]}
    assert process.wait(60) in (0, 1)
    works = found["launcher.works"]
    # Whether it works is the kernel's choice; that it does not and nobody knows why is not.
    assert works["status"] == "ok" or "in a new cgroup" in works["remedy"]


@pytest.mark.host
def test_text_is_plain_in_a_pipe_and_coloured_on_a_terminal(cli: Cli, start: Start) -> None:
    done = cli("doctor")
    assert b"\x1b" not in done.stdout
    assert b"ok    kernel: Linux " in done.stdout
    ours, theirs = pty.openpty()
    process = start("doctor", stdout=theirs)
    os.close(theirs)
    shown = b""
    try:
        while True:
            shown += os.read(ours, 4096)
    except OSError:  # EIO: the other side is closed
        pass
    finally:
        os.close(ours)
    assert process.wait(60) == done.returncode
    assert b"kernel" in shown
    if os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown"):
        assert b"\x1b[" in shown


@pytest.mark.host
@pytest.mark.parametrize("words", [["doctor"], ["doctor", "--json"]])
def test_reader_who_went_away_is_no_error(start: Start, words: list[str]) -> None:
    process = start(*words)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
