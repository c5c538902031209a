"""The group on the real kernel."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from cgroups import (
    BusyError,
    Cgroup,
    CgroupError,
    ExistsError,
    FormatError,
    GoneError,
    Limits,
    NotSupportedError,
    find_mount,
)
from tests.cgroups.conftest import NOBODY, Start, run_as

pytestmark = pytest.mark.host


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_child_that_cannot_be_opened_is_not_made(group: Cgroup) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(CgroupError, match="open files"):
            group.child("a.scope", create=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert group.child_names() == []


def test_a_child_is_made_once(group: Cgroup) -> None:
    with group.child("a.scope", create=True) as child:
        assert child.path == group.path / "a.scope"
        assert child.name == "a.scope"
        assert group.child_names() == ["a.scope"]
        assert os.path.samestat(os.fstat(child.fd), os.stat(child.path))
        assert not os.get_inheritable(child.fd)
        with pytest.raises(ExistsError):
            group.child("a.scope", create=True)
        with group.child("a.scope", create=True, exist_ok=True) as same:
            assert same.fd != child.fd
            assert os.path.sameopenfile(same.fd, child.fd)


def test_the_umask_does_not_shut_the_processes_out(group: Cgroup) -> None:
    before = os.umask(0o077)
    try:
        with group.child("a.scope", create=True) as child:
            assert os.fstat(child.fd).st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\nb", "a\0b", "a" * 256, "ä" * 128])
def test_names_that_no_cgroup_can_have(group: Cgroup, name: str) -> None:
    for create in (True, False):
        with pytest.raises(FormatError):
            group.child(name, create=create)
    assert group.child_names() == []


def test_a_kernel_file_is_no_child(group: Cgroup) -> None:
    with pytest.raises(ExistsError):
        group.child("cgroup.procs", create=True)
    with pytest.raises(CgroupError):
        group.child("cgroup.procs")


def test_what_is_not_there_cannot_be_opened(group: Cgroup, tmp_path: Path) -> None:
    with pytest.raises(GoneError):
        group.child("a.scope")
    with pytest.raises(GoneError):
        Cgroup.open(group.path / "a.scope")
    with pytest.raises(NotSupportedError, match="no cgroup v2 directory"):
        Cgroup.open(tmp_path)
    (tmp_path / "link").symlink_to(group.path)
    with pytest.raises(CgroupError):
        Cgroup.open(tmp_path / "link")


def test_children_can_be_walked_while_one_is_removed(group: Cgroup) -> None:
    for name in ("a.scope", "b.scope", "c.scope"):
        group.child(name, create=True).close()
    walk = group.children()
    with next(walk) as first:
        assert first.name == "a.scope"
    os.rmdir(group.path / "b.scope")
    rest = list(walk)
    assert [child.name for child in rest] == ["c.scope"]
    for child in rest:
        child.close()


def test_what_it_runs_is_listed(group: Cgroup, start: Start) -> None:
    assert not group.populated()
    with group.child("a.scope", create=True) as child:
        process = start("echo ready; read x < /dev/zero", child)
        assert child.pids() == child.threads() == [process.pid]
        assert group.pids() == []
        assert group.pids(recursive=True) == [process.pid]
        assert group.populated()
        assert child.populated()


def test_processes_of_a_threaded_cgroup_are_listed_once(group: Cgroup, start: Start) -> None:
    process = start("echo ready; read x < /dev/zero")
    with group.child("a.scope", create=True):
        (group.path / "a.scope/cgroup.type").write_text("threaded")
        assert group.pids(recursive=True) == [process.pid]


def test_a_process_can_be_moved(group: Cgroup, start: Start) -> None:
    with group.child("a.scope", create=True) as one, group.child("b.scope", create=True) as two:
        process = start("echo ready; read x < /dev/zero", one)
        two.move_here(process.pid)
        assert one.pids() == []
        assert two.pids() == [process.pid]
        with pytest.raises(CgroupError):
            two.move_here(2**22 + 1)


def test_limits_that_the_host_cannot_enforce_are_an_error_that_names_them_all(group: Cgroup) -> None:
    missing = {"cpu", "memory", "pids"} - group.controllers()
    if not missing:
        pytest.skip("needs a host whose v2 tree lacks a controller")
    with pytest.raises(NotSupportedError, match=f"lacks controllers: {', '.join(sorted(missing))}") as caught:
        group.apply(Limits(memory_max="1G", cpu_max=1, pids_max=10))
    assert caught.value.remedy
    mount = find_mount()
    if missing <= mount.v1_controllers:
        assert "systemd.unified_cgroup_hierarchy=1" in caught.value.remedy


def test_controllers_that_do_not_exist_cannot_be_enabled(group: Cgroup) -> None:
    with pytest.raises(NotSupportedError, match="lacks controllers: bread, wine"):
        group.enable(["wine", "bread"])
    group.enable([])
    assert group.enabled() == frozenset()


def test_the_root_cgroup_has_no_events() -> None:
    with Cgroup.open(find_mount().path) as top, pytest.raises(NotSupportedError):
        top.populated()


def test_marks_last_as_long_as_the_cgroup(group: Cgroup) -> None:
    with group.child("a.scope", create=True) as child:
        assert child.marks("pactown.test") is None
        child.mark("pactown.test", b"\0one")
        child.mark("pactown.test", b"\xfftwo")
    with group.child("a.scope") as again:
        assert again.marks("pactown.test") == b"\xfftwo"
        assert os.listxattr(again.fd) == ["trusted.pactown.test"]
        again.remove()
    with group.child("a.scope", create=True) as other:
        assert other.marks("pactown.test") is None


def test_marks_of_a_user_without_roots_rights(group: Cgroup) -> None:
    def mark() -> bool:
        group.mark("pactown.test", b"1")
        return True

    def refused() -> bool:
        with pytest.raises(CgroupError, match="delegated to this user"):
            mark()
        return True

    assert run_as(NOBODY, refused)
    os.chown(group.path, NOBODY, NOBODY)
    assert run_as(NOBODY, mark)
    assert run_as(NOBODY, lambda: group.marks("pactown.test") == b"1")
    # What a user writes is never taken for root's mark.
    assert group.marks("pactown.test") is None


def test_a_user_without_rights_is_told_so(group: Cgroup) -> None:
    def refused() -> bool:
        with pytest.raises(CgroupError, match="delegated to this user") as caught:
            group.child("a.scope", create=True)
        with pytest.raises(CgroupError, match="delegated to this user"):
            group.kill()
        return caught.value.errno is not None

    assert run_as(NOBODY, refused)


def test_removing_is_refused_while_something_is_in_it(group: Cgroup, start: Start) -> None:
    with group.child("a.scope", create=True) as child:
        with pytest.raises(BusyError, match=r"it has children: a\.scope"):
            group.remove()
        process = start("echo ready; read x < /dev/zero", child)
        with pytest.raises(BusyError, match="it has processes"):
            child.remove()
        with pytest.raises(BusyError, match="it has processes"):
            group.remove(recursive=True)
        child.kill()
        process.wait()
        child.wait_empty(10)
        child.remove()
        child.remove()
    assert group.child_names() == []


def test_removing_takes_everything_below_along(group: Cgroup) -> None:
    for name in ("a", "a/b", "a/b/c", "a/d", "e"):
        (group.path / name).mkdir()
    group.remove(recursive=True)
    assert not group.path.exists()


def test_a_cgroup_made_again_is_not_mistaken(group: Cgroup, start: Start) -> None:
    with group.child("a.scope", create=True) as old:
        os.rmdir(old.path)
        with group.child("a.scope", create=True) as new:
            process = start("echo ready; read x < /dev/zero", new)
            for act in (
                old.kill,
                old.populated,
                old.frozen,
                old.pids,
                old.stats,
                old.controllers,
                old.watch,
                old.remove,
                lambda: old.signal(15),
                lambda: old.freeze(0),
                lambda: old.remove(recursive=True),
                lambda: old.apply(Limits(pids_max=1)),
                lambda: old.move_here(process.pid),
                lambda: old.child("b.scope", create=True),
            ):
                with pytest.raises(GoneError):
                    act()
            old.wait_empty(0)
            assert new.pids() == [process.pid]
            assert process.poll() is None


def test_no_descriptor_is_left(group: Cgroup, start: Start) -> None:
    def once() -> None:
        with group.child("a.scope", create=True) as child, child.watch() as watch:
            child.stats(pressure=True)
            child.freeze()
            child.thaw()
            child.signal(15)
            child.wait_empty(10)
            watch.read()
            for each in group.children():
                each.close()
            with pytest.raises(NotSupportedError):
                child.enable(["bread"])
            child.remove()
        with pytest.raises(GoneError):
            group.child("a.scope")
        assert group.signal(0) == len(group.pids(recursive=True)) == 1

    with group.child("b.scope", create=True) as busy:
        start("echo ready; read x < /dev/zero", busy)
    once()
    before = descriptors()
    for _ in range(20):
        once()
    assert descriptors() == before


def test_what_is_not_closed_warns_and_is_closed(group: Cgroup) -> None:
    def forget(act: Callable[[], object]) -> None:
        act()
        gc.collect()

    gc.collect()
    before = descriptors()
    with pytest.warns(ResourceWarning, match=r"unclosed <Cgroup '.*/a\.scope'"):
        forget(lambda: group.child("a.scope", create=True))
    with pytest.warns(ResourceWarning, match=r"unclosed <cgroups\.events\.Watch"):
        forget(group.watch)
    assert descriptors() == before


def test_closing_twice_does_nothing(group: Cgroup) -> None:
    child = group.child("a.scope", create=True)
    child.close()
    child.close()
    assert "closed" in repr(child)
    watch = group.watch()
    watch.close()
    watch.close()
