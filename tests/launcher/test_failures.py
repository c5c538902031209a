"""A start that fails names its step, and leaves nothing; and what the launcher does where the kernel refuses."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pactown_runner.errors import SpecError, StartError
from pactown_runner.launcher import STEPS, Directory, LaunchSpec, launch_popen

from .conftest import ENV, Leaf, MakeSpec
from .filtered import in_a_child

pytestmark = [pytest.mark.host, pytest.mark.usefixtures("leaves_nothing")]


def failure(spec: LaunchSpec, cgroup_fd: int | None = None) -> StartError:
    with pytest.raises(StartError) as caught:
        launch_popen(spec, cgroup_fd, stdout=subprocess.PIPE)
    return caught.value


# ---- The program


def test_a_missing_program(spec: MakeSpec) -> None:
    error = failure(spec("no-such-program"))
    assert (error.step, error.errno) == ("execve", errno.ENOENT)
    assert "'no-such-program'" in str(error)
    assert "PATH" in str(error)
    assert failure(spec("/no/such/program")).errno == errno.ENOENT
    assert failure(spec("")).errno == errno.ENOENT


def test_a_file_that_may_not_be_executed(spec: MakeSpec) -> None:
    error = failure(spec("/etc/passwd"))
    assert (error.step, error.errno) == ("execve", errno.EACCES)


@pytest.fixture
def bins(users_base: Path) -> Path:
    """A PATH entry with `plain`, which may not be executed, and `text`, which is no program."""
    (users_base / "plain").write_text("#!/bin/sh\n")
    (users_base / "text").write_text("echo hello\n")
    (users_base / "text").chmod(0o755)
    (users_base / "orphan").write_text("#!/no/such/interpreter\n")
    (users_base / "orphan").chmod(0o755)
    secret = users_base / "secret"
    secret.mkdir(mode=0o700)
    (secret / "true").symlink_to("/bin/true")
    return users_base


def test_path_is_searched_as_the_tenant(spec: MakeSpec, bins: Path) -> None:
    # root could look into the first entry; the tenant cannot, and goes on
    path = f"{bins / 'secret'}:/no/such/entry::/etc/passwd:/usr/bin:/bin"
    popen, _ = launch_popen(spec("true", path=path), None)
    assert popen.wait() == 0
    error = failure(spec("true", path=str(bins / "secret")))
    assert (error.step, error.errno) == ("execve", errno.EACCES)


def test_denied_is_said_only_if_nothing_else_is_found(spec: MakeSpec, bins: Path) -> None:
    assert failure(spec("plain", path=f"{bins}:/usr/bin")).errno == errno.EACCES
    (bins / "plain").unlink()
    assert failure(spec("plain", path=f"{bins}:/usr/bin")).errno == errno.ENOENT


def test_a_file_without_an_interpreter_is_not_given_to_a_shell(spec: MakeSpec, bins: Path) -> None:
    assert failure(spec("text", path=str(bins))).errno == errno.ENOEXEC
    assert failure(spec("orphan", path=str(bins))).errno == errno.ENOENT


def test_an_empty_path_entry_is_the_programs_directory(spec: MakeSpec, bins: Path) -> None:
    assert failure(spec("text", path="", directories=[Directory(bins)])).errno == errno.ENOEXEC


def test_a_path_entry_of_any_length_is_survived(spec: MakeSpec) -> None:
    popen, _ = launch_popen(spec("true", path=f"/{'x' * 5000}:/bin"), None)
    assert popen.wait() == 0


def test_too_large_for_the_kernel(spec: MakeSpec) -> None:
    error = failure(spec("true", "x" * 200_000))
    assert (error.step, error.errno) == ("execve", errno.E2BIG)
    assert failure(spec("true", *["x" * 1000] * 12_000)).errno == errno.E2BIG


def test_many_arguments_that_fit(spec: MakeSpec) -> None:
    popen, _ = launch_popen(spec("sh", "-c", "echo $#", *["x" * 1000] * 1000), None, stdout=subprocess.PIPE)
    assert popen.communicate()[0] == b"999\n"


@pytest.mark.parametrize(
    "options",
    [
        {"argv": []},
        {"argv": ["true", "a\0b"]},
        {"argv": ["true", "\ud800"]},
        {"env": {"A": "\0"}},
        {"directories": [Directory("/tmp\0")]},
        {"argv": ["true", "x" * (17 << 20)]},
        {"uid": 0},
        {"gid": 0},
        {"uid": 0xFFFFFFFF},
        {"uid": -1},
        {"oom_score_adj": 1001},
    ],
)
def test_what_can_never_be_started_is_refused_before(spec: MakeSpec, options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        launch_popen(spec("true", **options), None)


# ---- Directories


def test_a_directory_that_the_tenant_cannot_enter(spec: MakeSpec, users_base: Path) -> None:
    closed = users_base / "closed"
    closed.mkdir(mode=0o700)
    error = failure(spec("true", directories=[Directory(users_base), Directory("closed")]))
    assert (error.step, error.errno) == ("directories", errno.EACCES)
    assert "'closed'" in str(error)


def test_a_directory_that_the_tenant_cannot_make(spec: MakeSpec, users_base: Path) -> None:
    error = failure(spec("true", directories=[Directory(users_base), Directory("new", make=True)]))
    assert (error.step, error.errno) == ("directories", errno.EACCES)
    assert not (users_base / "new").exists()


def test_a_directory_that_is_not_there_or_none(spec: MakeSpec) -> None:
    assert failure(spec("true", directories=[Directory("/no/such")])).errno == errno.ENOENT
    assert failure(spec("true", directories=[Directory("/etc/passwd")])).errno == errno.ENOTDIR


# ---- The cgroup


def test_a_cgroup_that_was_removed(spec: MakeSpec, leaf: Leaf) -> None:
    leaf.directory.rmdir()
    error = failure(spec("true"), leaf.fd)
    assert error.step == "clone3"
    assert error.errno in {errno.ENODEV, errno.ENOENT}
    assert "removed" in str(error)


def test_a_cgroup_that_takes_no_process(spec: MakeSpec, leaf: Leaf) -> None:
    sibling = leaf.directory.with_name("threaded.scope")
    sibling.mkdir()
    (sibling / "cgroup.type").write_text("threaded")  # which makes the leaf a `domain invalid` one
    error = failure(spec("true"), leaf.fd)
    assert (error.step, error.errno) == ("clone3", errno.EOPNOTSUPP)


@pytest.fixture
def leaf_with_pids(leaf: Leaf) -> Leaf:
    slice_dir = leaf.directory.parent
    if "pids" not in (slice_dir / "cgroup.controllers").read_text().split():
        pytest.skip(f"needs the pids controller in {slice_dir} (cgroup.subtree_control of {slice_dir.parent})")
    (slice_dir / "cgroup.subtree_control").write_text("+pids")
    return leaf


@pytest.mark.kernel
def test_a_cgroup_whose_pids_are_spent(spec: MakeSpec, leaf_with_pids: Leaf) -> None:
    (leaf_with_pids.directory / "pids.max").write_text("0")
    error = failure(spec("true"), leaf_with_pids.fd)
    assert (error.step, error.errno) == ("clone3", errno.EAGAIN)


@pytest.mark.kernel
def test_a_cgroup_that_passes_controllers_on(spec: MakeSpec, leaf: Leaf) -> None:
    # Memory, not pids: of what can also be controlled by thread, a cgroup may pass on some and have processes itself.
    for directory in (leaf.directory.parent, leaf.directory):
        (directory / "cgroup.subtree_control").write_text("+memory")
    error = failure(spec("true"), leaf.fd)
    assert (error.step, error.errno) == ("clone3", errno.EBUSY)


def test_a_directory_that_is_no_cgroup(spec: MakeSpec) -> None:
    fd = os.open("/", os.O_RDONLY)
    try:
        error = failure(spec("true"), fd)
    finally:
        os.close(fd)
    assert (error.step, error.errno) == ("clone3", errno.EBADF)


def filtered(leaf: Leaf, tenant: int, *refusal: object, **spec: Any) -> dict[str, Any]:
    known = {"argv": ["cat", "/proc/self/cgroup"], "uid": tenant, "gid": tenant, "env": ENV}
    return in_a_child({"filter": refusal, "cgroup_fd": leaf.fd, "spec": known | spec})


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EPERM])
def test_where_clone3_is_filtered_it_joins_and_says_so(leaf: Leaf, tenant: int, answer: int) -> None:
    result = filtered(leaf, tenant, "clone3", None, answer)
    assert result["step"] is None
    assert result["report"]["placement"] == "joined"
    assert result["report"]["cgroup"] == leaf.path
    assert f"0::{leaf.path}\n" in result["stdout"]


def test_where_clone3_is_filtered_a_removed_cgroup_fails_to_be_joined(leaf: Leaf, tenant: int) -> None:
    leaf.directory.rmdir()
    result = filtered(leaf, tenant, "clone3", None, errno.ENOSYS)
    assert (result["step"], result["errno"]) in {("join", errno.ENODEV), ("join", errno.ENOENT)}


# ---- Each step refused by the kernel


@pytest.mark.parametrize(
    ("step", "refusal"),
    [
        ("clone3", ("clone3", None, errno.EAGAIN)),
        ("setsid", ("setsid", None, errno.EPERM)),
        ("keyring", ("keyctl", None, errno.EDQUOT)),
        ("signals", ("rt_sigaction", 35, errno.EINVAL)),
        ("priority", ("setpriority", None, errno.EACCES)),
        ("rlimits", ("prlimit64", None, errno.EPERM)),
        ("namespaces", ("unshare", None, errno.EPERM)),
        ("bounding", ("prctl", 24, errno.EPERM)),
        ("setgroups", ("setgroups", None, errno.EPERM)),
        ("setresgid", ("setresgid", None, errno.EPERM)),
        ("setresuid", ("setresuid", None, errno.EAGAIN)),
        ("capabilities", ("capset", None, errno.EPERM)),
        ("no_new_privs", ("prctl", 38, errno.EINVAL)),
        ("close_range", ("close_range", None, errno.ENOSYS)),
        ("readback", ("getresuid", None, errno.EFAULT)),
    ],
)
def test_a_refused_step_ends_the_start(leaf: Leaf, tenant: int, step: str, refusal: tuple[Any, ...]) -> None:
    result = filtered(leaf, tenant, *refusal, namespaces=["uts"])
    assert (result["step"], result["errno"]) == (step, refusal[2])
    assert step in STEPS
    assert leaf.pids() == []


@pytest.mark.parametrize(
    ("step", "call", "first_argument"),
    [
        ("regain", "setresuid", None),
        ("regain", "setresgid", None),
        ("regain", "setuid", None),
        ("regain", "setregid", None),
        ("regain", "setgroups", None),
        ("readback", "prctl", 38),  # PR_SET_NO_NEW_PRIVS
        ("readback", "prctl", 24),  # PR_CAPBSET_DROP
    ],
)
def test_a_success_that_never_was_is_found_out(
    leaf: Leaf, tenant: int, step: str, call: str, first_argument: int | None
) -> None:
    result = filtered(leaf, tenant, call, first_argument, 0)
    assert (result["step"], result["errno"]) == (step, errno.EPERM)


@pytest.mark.parametrize("answer", [errno.ENOSYS, errno.EPERM])
def test_a_refused_keyring_is_tolerated_and_reported(leaf: Leaf, tenant: int, answer: int) -> None:
    result = filtered(leaf, tenant, "keyctl", None, answer)
    assert result["step"] is None
    assert result["report"]["keyring"] is False


def test_a_cgroup_that_cannot_be_read_back_is_unknown(leaf: Leaf, tenant: int) -> None:
    spec = {"argv": ["true"], "uid": tenant, "gid": tenant, "env": ENV}
    result = in_a_child({"hide_proc": True, "cgroup_fd": leaf.fd, "spec": spec})
    assert result["step"] is None
    assert result["report"]["cgroup"] is None
    assert result["report"]["placement"] == "born"


# ---- User mode


def as_user(uid: int, **options: Any) -> dict[str, Any]:
    spec = {"argv": ["cat", "/proc/self/status"], "mode": "user", "env": ENV}
    return in_a_child({"uid": uid, "spec": spec, **options})


def test_user_mode_keeps_the_callers_ids_and_drops_the_rest(tenant: int) -> None:
    result = as_user(tenant, groups=[tenant + 1])
    assert result["step"] is None, result
    report = result["report"]
    assert report["uid"] == [tenant] * 3
    assert report["gid"] == [tenant] * 3
    assert report["groups"] == [tenant + 1]
    assert report["root_regainable"] is None
    assert report["no_new_privs"] is True
    sets = report["capabilities"]
    assert not any(sets[name] for name in ("inheritable", "permitted", "effective", "ambient"))
    status = dict(line.split(":\t", 1) for line in result["stdout"].splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert status["CapEff"] == "0" * 16
    assert int(status["CapBnd"], 16) == sets["bounding"] != 0
    assert status["Umask"] == "0077"


def test_user_mode_gives_up_a_saved_uid(tenant: int) -> None:
    result = as_user(tenant, uids=[tenant, tenant, 0])
    assert result["step"] is None, result
    assert result["report"]["uid"] == [tenant] * 3


def test_user_mode_is_not_for_root(spec: MakeSpec) -> None:
    error = failure(spec("true", mode="user"))
    assert (error.step, error.errno) == ("spec", errno.EPERM)
