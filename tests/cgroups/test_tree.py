from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest

from cgroups import (
    Cgroup,
    GoneError,
    Mount,
    NotSupportedError,
    available_controllers,
    delegated,
    find_mount,
    own_directory,
    own_path,
)
from tests.cgroups.conftest import NOBODY, run_as

PURE = "31 24 0:27 / /sys/fs/cgroup rw,nosuid,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
HYBRID = """\
31 23 0:28 / /sys/fs/cgroup ro,nosuid,nodev,noexec shared:9 - tmpfs tmpfs ro,mode=755
32 31 0:29 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
33 31 0:30 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,name=systemd
34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:12 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,nosuid shared:13 - cgroup cgroup rw,memory
"""
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,nosuid shared:13 - cgroup cgroup rw,memory\n"
CONTAINER = "812 801 0:27 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw,nsdelegate\n"
HOST_NAMESPACE = (
    "812 801 0:27 /docker/4f1d /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime master:4 - cgroup2 cgroup rw\n"
)
FOREIGN = "812 801 0:27 /../../init.scope /mnt/cg rw,relatime - cgroup2 cgroup rw\n"


def path(text: str) -> PurePosixPath:
    return PurePosixPath(text)


def test_a_pure_v2_host() -> None:
    mount = find_mount(PURE)
    assert mount == Mount(Path("/sys/fs/cgroup"))
    assert not mount.hybrid


def test_a_hybrid_host_says_what_v1_holds() -> None:
    mount = find_mount(HYBRID)
    assert mount.path == Path("/sys/fs/cgroup/unified")
    assert mount.hybrid
    assert mount.v1_controllers == {"cpu", "cpuacct", "memory"}


@pytest.mark.parametrize(
    ("text", "remedy"),
    [(V1, "boot with systemd.unified_cgroup_hierarchy=1"), ("", "mount -t cgroup2 none /sys/fs/cgroup")],
)
def test_no_v2_mount_is_an_error_with_a_remedy(text: str, remedy: str) -> None:
    with pytest.raises(NotSupportedError) as caught:
        find_mount(text)
    assert caught.value.remedy == remedy


def test_a_container_with_a_read_only_mount() -> None:
    mount = find_mount(CONTAINER)
    assert not mount.writable
    assert mount.directory(own_path("0::/\n")) == Path("/sys/fs/cgroup")


def test_a_container_in_the_hosts_cgroup_namespace() -> None:
    mount = find_mount(HOST_NAMESPACE)
    assert mount.root == path("/docker/4f1d")
    assert mount.directory(own_path("0::/docker/4f1d\n")) == Path("/sys/fs/cgroup")
    assert mount.directory(own_path("0::/docker/4f1d/app\n")) == Path("/sys/fs/cgroup/app")
    with pytest.raises(NotSupportedError, match="lies outside the mount"):
        mount.directory(path("/docker/4f1dee"))


def test_a_users_session() -> None:
    text = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-u7.scope\n"
    assert find_mount(PURE).directory(own_path(text)) == Path(
        "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/run-u7.scope"
    )


@pytest.mark.parametrize(("mountinfo", "own"), [(PURE, "/../outside"), (FOREIGN, "/"), (FOREIGN, "/../../init.scope")])
def test_what_lies_above_our_namespace_has_no_path(mountinfo: str, own: str) -> None:
    with pytest.raises(NotSupportedError, match="lies outside the mount"):
        find_mount(mountinfo).directory(path(own))


def test_a_removed_cgroup_has_no_path() -> None:
    with pytest.raises(GoneError):
        find_mount(PURE).directory(own_path("0::/a.scope (deleted)\n"))


def test_a_writable_mount_of_the_whole_tree_comes_first() -> None:
    read_only = PURE.replace("/sys/fs/cgroup rw", "/ro ro")
    part = PURE.replace("/ /sys/fs/cgroup", "/a.slice /part")
    assert find_mount(read_only + part + PURE).path == Path("/sys/fs/cgroup")
    assert find_mount(read_only + part).path == Path("/part")
    assert find_mount(read_only).path == Path("/ro")


def test_a_later_mount_hides_what_was_there() -> None:
    over = "99 24 0:99 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    with pytest.raises(NotSupportedError):
        find_mount(PURE + over)
    assert find_mount(over + PURE).path == Path("/sys/fs/cgroup")


def test_escaped_blanks_in_a_mount_point() -> None:
    assert find_mount(PURE.replace("/sys/fs/cgroup", r"/my\040cg\134")).path == Path("/my cg\\")


def test_own_path_without_a_v2_hierarchy() -> None:
    with pytest.raises(NotSupportedError):
        own_path("4:memory:/a\n")


@pytest.mark.host
def test_this_host() -> None:
    mount = find_mount()
    assert (mount.path / "cgroup.controllers").exists()
    assert os.getpid() in [int(pid) for pid in (own_directory(mount) / "cgroup.procs").read_text().split()]
    with Cgroup.open(mount.path) as top:
        assert available_controllers(mount) == top.controllers()
    assert not available_controllers(mount) & mount.v1_controllers


@pytest.mark.host
def test_delegation(group: Cgroup) -> None:
    assert delegated(group.path)
    assert not delegated(group.path / "missing")
    assert run_as(NOBODY, lambda: not delegated(group.path))
    for name in ("", "cgroup.procs", "cgroup.subtree_control"):
        assert run_as(NOBODY, lambda: not delegated(group.path))
        os.chown(group.path / name, NOBODY, NOBODY)
    assert run_as(NOBODY, lambda: delegated(group.path))
