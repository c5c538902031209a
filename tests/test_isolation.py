"""`UserIsolationManager`: what callers of the original program against, and that it runs beside a supervisor."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import subprocess
import threading
import typing
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import pactown_runner
from pactown_runner import (
    IsolatedUser,
    Settings,
    Supervisor,
    UserIsolationManager,
    get_isolation_manager,
    isolation,
    scoped_popen,
)
from pactown_runner.errors import LimitsError, NotFoundError, SpecError, StartError
from tests.supervising import eventually, leftovers, processes_of, python, soon, spec
from tests.test_exec import STOPPER

pytestmark = [pytest.mark.host, pytest.mark.deadline(120)]

REFERENCE = (Path(__file__).parent / "data/USER_ISOLATION.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", REFERENCE, re.DOTALL)
SIGNATURES = next(snippet for snippet in SNIPPETS if "class UserIsolationManager" in snippet)


@pytest.fixture
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """This process's environment names the test's own state."""
    first, last = settings.uid_ranges[0]
    for name in ("users_base", "state_dir", "log_dir", "run_dir", "cgroup_slice"):
        monkeypatch.setenv(f"PACTOWN_{name.upper()}", str(getattr(settings, name)))
    monkeypatch.setenv("PACTOWN_UID_RANGES", f"{first}-{last}")
    monkeypatch.setattr(isolation, "_manager", None)
    yield settings
    if isolation._manager is not None:
        isolation._manager.close()


@pytest.fixture
def manager(environment: Settings) -> Iterator[UserIsolationManager]:
    with UserIsolationManager() as manager:
        yield manager
    assert not leftovers(environment)


def scopes(settings: Settings) -> list[str]:
    return [what for what in leftovers(settings) if "run-" in what]


# ---- The reference


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_each_snippet_of_the_reference_runs_as_written(environment: Settings, tmp_path: Path, number: int) -> None:
    source = SNIPPETS[number].replace("from pactown import", "from pactown_runner import")
    # The one thing that cannot be as written: this test must not write there.
    source = source.replace("/backup/", f"{tmp_path}/")
    manager = get_isolation_manager()
    for user_id in ("user123", "saas_user_123"):
        manager.get_or_create_user(user_id)
    manager.export_user_data("user123", tmp_path / "user123_2026-01-16.tar.gz")
    alarms: list[str] = []
    names = {
        **vars(typing),
        "subprocess": subprocess,
        "Path": Path,
        "dataclass": dataclasses.dataclass,
        "UserIsolationManager": UserIsolationManager,
        "get_isolation_manager": get_isolation_manager,
        "manager": manager,
        "auth_user": type("AuthUser", (), {"id": "auth0|123456"}),
        "user_is_inactive": lambda user_id: user_id == "saas_user_123",
        "alert_admin": alarms.append,
    }
    exec(compile(source, f"snippet {number}", "exec"), names)
    if isinstance(process := names.get("process"), subprocess.Popen):
        process.communicate()
    if "delete_user" in source and "def " not in source:
        assert manager.get_user("saas_user_123") is None
    if isinstance(manager := names["manager"], UserIsolationManager):
        manager.close()
    assert not alarms


def test_names_parameters_defaults_and_types_are_the_references() -> None:
    names: dict[str, typing.Any] = {
        **vars(typing),
        "Path": Path,
        "subprocess": subprocess,
        "IsolatedUser": IsolatedUser,
    }
    exec(SIGNATURES, names)
    wanted = names["UserIsolationManager"]
    for name, method in vars(wanted).items():
        if inspect.isfunction(method):
            ours = inspect.signature(getattr(UserIsolationManager, name))
            theirs = inspect.signature(method)
            assert list(ours.parameters) == list(theirs.parameters), name
            for parameter, there in theirs.parameters.items():
                assert ours.parameters[parameter].default == there.default, (name, parameter)
    fields = next(snippet for snippet in SNIPPETS if "class IsolatedUser" in snippet)
    exec(fields, names | {"dataclass": dataclasses.dataclass}, names)
    assert [field.name for field in dataclasses.fields(IsolatedUser)] == [
        field.name for field in dataclasses.fields(names["IsolatedUser"])
    ]


def test_the_public_names_are_there() -> None:
    assert {"IsolatedUser", "UserIsolationManager", "get_isolation_manager"} <= set(pactown_runner.__all__)


# ---- Users


def test_users(manager: UserIsolationManager, environment: Settings) -> None:
    assert manager.users_base == environment.users_base
    assert manager.get_user("user123") is None
    user = manager.get_or_create_user("user123")
    assert user == manager.get_user("user123") == manager.get_or_create_user("user123")
    assert user.linux_uid == environment.uid_ranges[0][0]
    assert json.loads(json.dumps(user.to_dict()))["home_dir"] == str(user.home_dir)
    assert manager.list_users() == [user]
    assert manager.delete_user("user123")
    assert not manager.delete_user("user123")
    assert manager.list_users() == []
    assert not user.home_dir.exists()


def test_a_home_that_is_kept_comes_back(manager: UserIsolationManager) -> None:
    user = manager.get_or_create_user("user123")
    process = manager.run_as_user("user123", "echo kept > file", manager.get_sandbox_path("user123", "api"))
    assert process.communicate() == (b"", b"")
    assert manager.delete_user("user123", delete_home=False)
    assert user.home_dir.stat().st_uid == 0
    again = manager.get_or_create_user("user123")
    assert (again.linux_uid, again.home_dir) == (user.linux_uid, user.home_dir)
    process = manager.run_as_user("user123", "cat file", manager.get_sandbox_path("user123", "api"))
    assert process.communicate() == (b"kept\n", b"")


def test_a_sandbox_path_is_a_directory_of_the_users(manager: UserIsolationManager) -> None:
    path = manager.get_sandbox_path("user123", "my-api")
    user = manager.get_user("user123")
    assert user is not None
    assert path == user.home_dir / "sandboxes/my-api"
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (user.linux_uid, 0o700)
    with pytest.raises(SpecError):
        manager.get_sandbox_path("user123", "../other")


def test_stats_count_as_the_user(manager: UserIsolationManager) -> None:
    path = manager.get_sandbox_path("user123", "one")
    manager.get_sandbox_path("user123", "two")
    assert manager.run_as_user("user123", "head -c 3000000 /dev/zero > big", path).communicate() == (b"", b"")
    stats = manager.get_user_stats("user123")
    assert stats["user"] == {"saas_user_id": "user123", "linux_username": path.parts[-3]}
    assert stats["sandbox_count"] == 2
    assert 2.8 < stats["total_size_mb"] < 3.5
    with pytest.raises(NotFoundError):
        manager.get_user_stats("nobody")


# ---- Programs


def test_a_program_runs_as_the_user_in_a_scope_that_goes_with_it(
    manager: UserIsolationManager, environment: Settings
) -> None:
    cwd = manager.get_sandbox_path("user123", "api")
    user = manager.get_user("user123")
    assert user is not None
    os.environ["SECRET"] = "operator's"
    try:
        process = manager.run_as_user(
            "user123", "id -u; pwd; echo $PORT $SECRET; cat /proc/self/cgroup >&2; read x", cwd, env={"PORT": "8001"}
        )
    finally:
        del os.environ["SECRET"]
    out, err = process.communicate()
    assert out.decode().splitlines() == [str(user.linux_uid), str(cwd), "8001"]
    assert re.search(r"/pactown-\w+\.slice/run-\w+\.scope$", err.decode(), re.MULTILINE)


async def test_what_it_leaves_running_is_killed(manager: UserIsolationManager, environment: Settings) -> None:
    cwd = manager.get_sandbox_path("user123", "api")
    process = manager.run_as_user("user123", "setsid sleep 1000 > /dev/null 2>&1 & echo $!", cwd)
    process.communicate()
    await eventually(lambda: not scopes(environment))
    user = manager.get_user("user123")
    assert user is not None
    assert not processes_of(user.linux_uid)


def test_who_stops_what_is_started_keeps_nobody(manager: UserIsolationManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoped_popen, "START_TIMEOUT", 0.2)
    cwd = manager.get_sandbox_path("user123", "api")
    with manager.run_as_user("user123", shlex.join(python(STOPPER)), cwd) as stopper:
        assert stopper.stdout is not None
        assert stopper.stdout.readline() == b"ready\n"
        given_up: list[tuple[str, str]] = []
        while len(given_up) < 3:
            try:
                with manager.run_as_user("user123", "true", cwd / "maze18") as process:
                    process.kill()  # stopped as well, or faster than that
            except StartError as error:
                given_up.append((error.step, error.message))
        assert set(given_up) == {("launcher", "not executed after 0.2 s")}
        assert stopper.poll() is None
        stopper.kill()


def test_errors_are_typed_and_leave_nothing(manager: UserIsolationManager, environment: Settings) -> None:
    with pytest.raises(StartError) as caught:
        manager.run_as_user("user123", "true", Path("/root"))
    assert caught.value.step == "directories"
    with pytest.raises(SpecError):
        manager.run_as_user("user123", "", Path("/"))
    assert not scopes(environment)


async def test_all_ends_with_the_manager(environment: Settings) -> None:
    with UserIsolationManager() as manager:
        processes = [manager.run_as_user("user123", "sleep 1000", Path("/")) for _ in range(3)]
    assert [process.wait() for process in processes] == [-9] * 3
    for process in processes:
        process.communicate()
    assert not leftovers(environment)


def test_limits_hold_if_asked_for(environment: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACTOWN_DEFAULT_LIMITS", 'memory_max = "64M"')
    with UserIsolationManager() as manager:
        process = manager.run_as_user("user123", "true", Path("/"))
        process.communicate()
        assert process.returncode == 0
    with UserIsolationManager(enable_cgroups=True) as manager:
        if _controls_memory():
            process = manager.run_as_user("user123", "true", Path("/"))
            process.communicate()
        else:
            with pytest.raises(LimitsError):
                manager.run_as_user("user123", "true", Path("/"))
    assert not leftovers(environment)


def _controls_memory() -> bool:
    from cgroups import available_controllers, find_mount  # noqa: PLC0415

    return "memory" in available_controllers(find_mount())


# ---- Threads, other managers, supervisors


def test_many_threads(manager: UserIsolationManager) -> None:
    def work(number: int) -> bytes:
        user_id = f"user{number % 3}"
        process = manager.run_as_user(user_id, f"echo {number}", manager.get_sandbox_path(user_id, "api"))
        out, _ = process.communicate()
        return out

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == [f"{number}\n".encode() for number in range(24)]
    assert len(manager.list_users()) == 3


async def test_beside_a_supervisor(environment: Settings) -> None:
    async with Supervisor(settings=environment) as supervisor:
        sandbox = await supervisor.start(spec(["sleep", "1000"], user="user123"))
        with UserIsolationManager() as manager:
            assert manager.list_users() == await supervisor.users.list()
            process = manager.run_as_user("user123", "cat /proc/self/cgroup", Path("/"))
            out, _ = await soon(_communicate(process))
            assert b"/run-" in out
        assert sandbox.state == "running"


async def _communicate(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    import asyncio  # noqa: PLC0415

    return await asyncio.to_thread(process.communicate)


def test_export_and_import(manager: UserIsolationManager, tmp_path: Path) -> None:
    cwd = manager.get_sandbox_path("user123", "api")
    assert manager.run_as_user("user123", "echo content > file", cwd).communicate() == (b"", b"")
    archive = tmp_path / "user123.tar.gz"
    assert manager.export_user_data("user123", archive)
    assert not manager.export_user_data("nobody", archive)
    assert manager.delete_user("user123")
    assert manager.import_user_data("user123", archive)
    process = manager.run_as_user("user123", "cat file", cwd)
    assert process.communicate()[0] == b"content\n"


def test_the_manager_of_a_process_is_one(environment: Settings) -> None:
    found = set()
    threads = [threading.Thread(target=lambda: found.add(get_isolation_manager())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1
