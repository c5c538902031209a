"""Where sandboxes are placed: slices and scopes, whose they are, and the first process's note on them."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cgroups import Cgroup, ExistsError, GoneError, Limits, find_mount
from pactown_runner.errors import LimitsError, TreeError
from pactown_runner.main_process import Main
from pactown_runner.models import IsolationReport
from pactown_runner.trees import Tree, apply_limits, open_tree, slice_name

pytestmark = pytest.mark.host

KEY = "0123abcd"
REPORT = IsolationReport(
    mode="root",
    uid=(1, 1, 1),
    gid=(1, 1, 1),
    groups=(),
    capabilities={},
    no_new_privs=True,
    root_regainable=False,
    cgroup="/x",
    placement="born",
    keyring=True,
)


def opened(cgroup_slice: str, state_id: str = "ours", limits: Limits | None = None) -> Tree:
    return open_tree(cgroup_slice=cgroup_slice, state_id=state_id, tenant_limits=limits or Limits())


@pytest.fixture
def tree(slice_name: str) -> Iterator[Tree]:
    tree = opened(slice_name)
    yield tree
    tree.close()


@pytest.fixture
def program() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as program:
        yield program
        program.kill()


def test_a_scope_lies_in_its_tenants_slice(tree: Tree, slice_name: str) -> None:
    with tree.scope(KEY, "api", "run1") as scope:
        assert scope.path == find_mount().path / slice_name / f"pactown-{KEY}.slice" / "api.scope"
        (found,) = tree.scopes()
        assert (found.slice_name, found.name, found.run_id) == (f"pactown-{KEY}.slice", "api.scope", "run1")
        with pytest.raises(ExistsError):
            tree.scope(KEY, "api", "run2")
        with tree.open_scope(found.slice_name, found.name) as again:
            assert os.path.samestat(os.fstat(again.fd), os.fstat(scope.fd))
        scope.remove()
    with pytest.raises(GoneError):
        tree.open_scope(found.slice_name, found.name)
    assert list(tree.scopes()) == []


def test_closing_removes_what_nobody_uses(tree: Tree, slice_name: str) -> None:
    top = find_mount().path / slice_name
    other = opened(slice_name)
    with tree.scope(KEY, "api", "run") as scope, other.slice("ffff0000"):
        tree.close()
        assert [path.name for path in top.glob("*.slice")] == [f"pactown-{KEY}.slice"]
        scope.remove()
    other.close()
    assert list(top.glob("*.slice")) == []


def test_two_states_on_one_slice_do_not_touch_each_other(tree: Tree, slice_name: str) -> None:
    other = opened(slice_name, "theirs")
    try:
        with tree.scope(KEY, "api", "run") as scope, other.scope("ffff0000", "api", "run") as theirs:
            with pytest.raises(TreeError, match="another state") as caught:
                other.slice(KEY)
            assert caught.value.remedy
            assert [found.slice_name for found in tree.scopes()] == [f"pactown-{KEY}.slice"]
            assert [found.slice_name for found in other.scopes()] == ["pactown-ffff0000.slice"]
            scope.remove()
            other.remove_unused_slices()
            with tree.slice(KEY) as mine:
                assert mine.path.exists()
            tree.remove_unused_slices()
            assert not (scope.path.parent).exists()
            theirs.remove()
    finally:
        other.close()


def test_a_slice_that_was_removed_is_made_anew(tree: Tree) -> None:
    with tree.scope(KEY, "api", "run") as scope:
        scope.remove()
    os.rmdir(scope.path.parent)
    with tree.scope(KEY, "api", "run") as again:
        assert again.path.exists()
        again.remove()


def test_slices_made_and_removed_at_once_by_many(tree: Tree, slice_name: str) -> None:
    """Whoever removes what is empty must not trip up who is about to use it."""
    done = threading.Event()
    others = [opened(slice_name) for _ in range(2)]

    def remove() -> None:
        while not done.is_set():
            others[0].remove_unused_slices()

    def make(number: int) -> int:
        which = (tree, *others)[number % 3]
        for count in range(100):
            with which.scope(KEY, f"s{number}", str(count)) as scope:
                scope.remove()
        return 1

    with ThreadPoolExecutor(7) as pool:
        removing = pool.submit(remove)
        try:
            assert sum(pool.map(make, range(6))) == 6
        finally:
            done.set()
        removing.result()
    for other in others:
        other.close()


def test_a_tree_without_its_top_says_so(tree: Tree) -> None:
    os.rmdir(tree.root.path)
    with pytest.raises(TreeError, match="was removed"):
        tree.scope(KEY, "api", "run")


def test_ending_a_scope(tree: Tree, program: subprocess.Popen[bytes]) -> None:
    with tree.scope(KEY, "api", "run1") as scope:
        scope.move_here(program.pid)
        where = (slice_name(KEY), "api.scope")
        # It is another run's.
        assert not tree.end_scope(*where, run_id="run2")
        assert program.poll() is None
        assert tree.end_scope(*where, run_id="run1")
        assert program.wait(10) == -9
        assert not scope.path.exists()
        assert not tree.end_scope(*where)
        # One that died before it was marked is whoever's asks.
        with tree.slice(KEY) as parent:
            parent.child("api.scope", create=True).close()
        assert tree.end_scope(*where, run_id="run2")


def test_limits_are_errors_with_a_remedy_where_controllers_are_missing(tree: Tree) -> None:
    offered = tree.root.controllers()
    limits = Limits(memory_max="64M", pids_max=5)
    missing = limits.controllers() - offered
    if not missing:
        pytest.skip("this host offers every controller")
    with tree.scope(KEY, "api", "run") as scope:
        with pytest.raises(LimitsError) as caught:
            apply_limits(scope, limits)
        assert all(name in caught.value.message for name in missing)
        assert caught.value.remedy
        assert apply_limits(scope, Limits()) == {}
        scope.remove()
        with pytest.raises(GoneError):
            apply_limits(scope, limits)


def test_a_tenant_limit_that_cannot_be_enforced_leaves_no_slice(slice_name: str) -> None:
    limits = Limits(memory_max="64M")
    tree = opened(slice_name, limits=limits)
    try:
        if limits.controllers() <= tree.root.controllers():
            pytest.skip("this host can enforce it")
        with pytest.raises(LimitsError):
            tree.slice(KEY)
        assert list(tree.root.child_names()) == []
    finally:
        tree.close()


def test_the_first_process_is_known_by_more_than_its_number(tree: Tree, program: subprocess.Popen[bytes]) -> None:
    with tree.scope(KEY, "api", "run") as scope:
        assert Main.read(scope) is None
        Main.update(scope, REPORT)
        assert Main.read(scope) is None
        main = Main.of(program.pid, REPORT)
        main.mark(scope)
        assert Main.read(scope) == main
        fd = main.pidfd()
        assert fd is not None
        os.close(fd)
        assert Main(program.pid, main.start_time + 1, REPORT).pidfd() is None
        program.kill()
        program.wait()
        assert main.pidfd() is None
        with pytest.raises(ProcessLookupError):
            Main.of(program.pid, REPORT)
        scope.remove()


def test_a_processs_name_does_not_deceive(tmp_path: Path) -> None:
    nasty = tmp_path / "a) Z 1 1"
    nasty.write_bytes(Path("/bin/sleep").read_bytes())
    nasty.chmod(0o755)
    with subprocess.Popen([nasty, "1000"]) as program:
        try:
            # A copy, and hence as old as one that has an honest name.
            with subprocess.Popen(["sleep", "1000"]) as honest:
                later = Main.of(honest.pid, REPORT).start_time
                honest.kill()
            assert 0 <= later - Main.of(program.pid, REPORT).start_time < 1000
        finally:
            program.kill()


def test_no_descriptor_of_a_slice_is_kept(tree: Tree) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        with tree.scope(f"{number:08x}", "api", "run") as scope:
            scope.remove()
        tree.tenant_oom(f"{number:08x}")
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_top_is_a_cgroup(tree: Tree) -> None:
    with Cgroup.open(tree.root.path) as group:
        assert not group.populated()
