"""Environments of sandboxes with requirements: made by real tenants, with the real `pip` and `uv`."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pactown_runner.archives import export_home
from pactown_runner.config import Settings
from pactown_runner.errors import ConfigError, SpecError, StartError
from pactown_runner.host import Host
from pactown_runner.jobs import Stop
from pactown_runner.launcher import DEFAULT_PATH, Directory, LaunchSpec, launch_popen
from pactown_runner.models import IsolatedUser
from pactown_runner.programs import tenant_environment
from pactown_runner.specs import SandboxSpec
from pactown_runner.supervisor import Supervisor
from pactown_runner.venv_layout import venv_of
from pactown_runner.venvs import ensure_venv
from tests.files.helpers import as_tenant, start_as_tenant
from tests.packages import Index, make_wheel, serving
from tests.supervising import USER, eventually, processes_of

if TYPE_CHECKING:
    from tests.hostguard import Run

pytest_plugins = ("tests.supervising",)

SERVICE = "api"
SAYS = "import tiny, sys; print(tiny.VERSION, sys.prefix)"


def _find_uv() -> str:
    """A `uv` that tenants can execute; "" without."""
    beside = str(Path(sys.executable).with_name("uv"))
    for path in filter(None, (shutil.which("uv", path=DEFAULT_PATH), beside)):
        try:
            subprocess.run([path, "--version"], user=65534, group=65534, extra_groups=[], check=True, stdout=-3)
        except (OSError, subprocess.SubprocessError):
            continue
        return path
    return ""


UV = _find_uv() if os.geteuid() == 0 else ""


@pytest.fixture
def wheels(test_run: Run) -> Path:
    """A folder of packages that tenants can read."""
    folder = Path(tempfile.mkdtemp(prefix="wheels-", dir=test_run.directory))
    folder.chmod(0o755)
    for version in ("1.0", "2.0"):
        make_wheel(folder, "tiny", version)
    return folder


@pytest.fixture
def index(wheels: Path) -> Iterator[Index]:
    with serving(wheels) as index:
        yield index


@pytest.fixture(params=["uv", "pip"])
def installer(request: pytest.FixtureRequest) -> str:
    """What `venv_uv` is to be, for each of the two that make environments."""
    if request.param == "uv" and not UV:
        pytest.skip("needs a uv that every user can execute (pip install uv)")
    return UV if request.param == "uv" else ""


@pytest.fixture
def host(supervisor: Supervisor, index: Index) -> Host:
    """With the faster of the two, where there are both."""
    assert supervisor._host is not None
    return having(supervisor._host, venv_uv=UV, venv_index=index.url, venv_timeout=60.0)


@pytest.fixture
async def user(supervisor: Supervisor) -> IsolatedUser:
    return await supervisor.users.get_or_create(USER)


def having(host: Host, **settings: Any) -> Host:
    return replace(host, settings=replace(host.settings, **settings))


async def ensure(
    host: Host, user: IsolatedUser, *requirements: str, service: str = SERVICE, stop: Stop | None = None
) -> Path:
    """Make it, and return where it is."""
    await asyncio.to_thread(ensure_venv, host, user, service, requirements, stop=stop)
    return place(host, user, *requirements)


def place(host: Host, user: IsolatedUser, *requirements: str) -> Path:
    venv = venv_of(host.settings, user, SERVICE, requirements)
    return Path(venv.cache, venv.name)


def cached(user: IsolatedUser) -> list[str]:
    return sorted(name for name in os.listdir(user.home_dir / ".cache/venvs") if name != ".lock")


async def run(
    host: Host, user: IsolatedUser, *requirements: str, command: list[str] | None = None, service: str = SERVICE
) -> str:
    """Start a program as a sandbox with these requirements would, without making anything; returns what it prints."""
    venv = venv_of(host.settings, user, service, requirements)
    argv = command or ["python", "-c", SAYS]
    environment = {**tenant_environment(user), **venv.variables(DEFAULT_PATH)}
    spec = LaunchSpec(
        argv=argv,
        uid=user.linux_uid,
        gid=user.linux_gid,
        env=environment,
        path=venv.search_path(argv[0], environment["PATH"]),
        directories=[
            Directory(venv.ready),
            Directory(user.home_dir),
            Directory("sandboxes", make=True),
            Directory(service, make=True),
        ],
    )

    def start() -> str:
        popen, _ = launch_popen(spec, None, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return popen.communicate()[0].decode().strip()

    return await asyncio.to_thread(start)


async def missing(host: Host, user: IsolatedUser, *requirements: str, **options: Any) -> None:
    """See that a start finds it missing, and starts nothing."""
    with pytest.raises(StartError) as caught:
        await run(host, user, *requirements, **options)
    assert caught.value.step in ("directories", "execve"), caught.value


# ---- What is asked for


def spec(**options: Any) -> SandboxSpec:
    return SandboxSpec(user_id=USER, service_id=SERVICE, command=["python", "main.py"], **options)


def test_requirements_survive_json() -> None:
    wanted = ["requests", "Flask[async]>=3,<4", "x @ https://example.com/x.whl#sha256=00", "y ; python_version>'3'"]
    written = spec(requirements=wanted)
    assert written.requirements == tuple(wanted)
    assert SandboxSpec.from_json(written.to_json()) == written
    values = json.loads(spec().to_json())
    # As an earlier version wrote it down.
    del values["requirements"]
    assert SandboxSpec.from_json(json.dumps(values)).requirements == ()


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "-e .", "--index-url=https://example.com", "# remark", "./here", "/etc", "a/b", ".", "~x"),
        *("a\n--no-index", "a\0", "a\x1b[31m", "a\u2028b", "\udcff", "https://example.com/x.whl", "a b", 5, None),
    ],
)
def test_what_is_no_requirement(text: Any) -> None:
    with pytest.raises(SpecError, match="requirement"):
        spec(requirements=["good", text])


@pytest.mark.parametrize("given", ["requests", b"requests", 5, None, {"requests": "2"}, {"requests"}])
def test_requirements_are_a_sequence_of_strings(given: Any) -> None:
    with pytest.raises(SpecError, match="requirements must be a sequence of strings"):
        spec(requirements=given)


def test_settings() -> None:
    environ = {"PACTOWN_VENV_PYTHON": "/opt/python3.12", "PACTOWN_VENV_INDEX": "https://a:b@example.com/simple"}
    settings = Settings.load(environ={**environ, "PACTOWN_VENV_UV": "", "PACTOWN_VENV_KEEP": "0"})
    assert (settings.venv_python, settings.venv_index) == (Path("/opt/python3.12"), "https://a:b@example.com/simple")
    assert (settings.venv_uv, settings.venv_keep, settings.venv_timeout) == ("", 0, 600.0)
    none = Settings.load(environ=dict.fromkeys(environ, "none"))
    assert (none.venv_python, none.venv_index) == (None, None)


@pytest.mark.parametrize(
    "given",
    [
        *({"venv_python": "python3"}, {"venv_index": "example.com"}, {"venv_index": "https://a b"}, {"venv_index": 5}),
        *({"venv_index": "https://a\n-e ."}, {"venv_uv": 5}, {"venv_uv": "a\0"}),
        *({"venv_timeout": 0}, {"venv_timeout": float("inf")}, {"venv_keep": -1}),
    ],
    ids=repr,
)
def test_settings_that_cannot_be(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        Settings(**given)


# ---- What names one


@pytest.fixture
def anybody() -> IsolatedUser:
    return IsolatedUser("x", "pactown_aabbccdd", 60001, 60001, Path("/home/x"), 0.0)


def test_what_tells_one_from_another(anybody: IsolatedUser, tmp_path: Path) -> None:
    def name(*requirements: str, service: str = SERVICE, user: IsolatedUser = anybody, **settings: Any) -> str:
        return venv_of(Settings(**settings), user, service, requirements).name

    python = tmp_path / "python3.12"
    same = {name("a", "b"), name("b", "a"), name("a", "b", "a"), name("a", "b", service="other")}
    assert len(same) == 1
    others = {
        name("a"),
        name("a b"),
        name("a", "c"),
        name("a", "b", venv_index="https://example.com/simple"),
        name("a", "b", venv_python=python),
        name("a", "b", user=replace(anybody, home_dir=Path("/home/y"))),
    }
    assert len(others) == 6
    assert not others & same


def test_an_interpreter_whose_name_does_not_tell_its_version(anybody: IsolatedUser, tmp_path: Path) -> None:
    python = tmp_path / "python3"
    settings = Settings(venv_python=python)
    names = []
    for text in ("one", "another"):
        python.write_text(text)
        names.append(venv_of(settings, anybody, SERVICE, ["a"]).name)
    assert names[0] != names[1]
    python.unlink()
    python.symlink_to(tmp_path / "python3.12")
    (tmp_path / "python3.12").write_text("one")
    before = venv_of(settings, anybody, SERVICE, ["a"])
    (tmp_path / "python3.12").write_text("patched")
    assert venv_of(settings, anybody, SERVICE, ["a"]) == before
    assert before.python == str(tmp_path / "python3.12")


def test_where_programs_are_sought(anybody: IsolatedUser) -> None:
    venv = venv_of(Settings(), anybody, SERVICE, ["a"])
    assert venv.variables("/usr/bin") == {
        "PATH": "/home/x/sandboxes/api/.venv/bin:/usr/bin",
        "VIRTUAL_ENV": "/home/x/sandboxes/api/.venv",
    }
    assert venv.search_path("python3", "/usr/bin") == "/home/x/sandboxes/api/.venv/bin"
    assert venv.search_path("gunicorn", "/usr/bin") == "/usr/bin"


# ---- Making it


@pytest.mark.host
async def test_a_program_runs_with_its_requirements(
    host: Host, user: IsolatedUser, index: Index, installer: str
) -> None:
    host = having(host, venv_uv=installer)
    await missing(host, user, "tiny==1.0")
    assert not (user.home_dir / ".cache").exists()
    path = await ensure(host, user, "tiny==1.0")
    link = user.home_dir / "sandboxes" / SERVICE / ".venv"
    assert (os.readlink(link), path.parent) == (str(path), user.home_dir / ".cache/venvs")
    assert await run(host, user, "tiny==1.0") == f"1.0 {link}"
    assert await run(host, user, "tiny==1.0", command=["tiny"]) == "1.0"
    assert await run(host, user, "tiny==1.0", command=["/bin/sh", "-c", f'python3 -c "{SAYS}"']) == f"1.0 {link}"
    assert await run(host, user, "tiny==1.0", command=["/bin/pwd"]) == str(link.parent)
    # Another service, other requirements; and without any, there are none.
    await missing(host, user, "tiny==1.0", service="other")
    await missing(host, user, "tiny==2.0")
    assert index.lookups == ["tiny"]
    assert cached(user) == [path.name]


@pytest.mark.host
async def test_all_of_it_is_the_tenants(host: Host, user: IsolatedUser, installer: str) -> None:
    host = having(host, venv_uv=installer)
    await ensure(host, user, "tiny==1.0")
    seen = [path for top in (".cache", "sandboxes") for path in (user.home_dir / top).rglob("*")]
    assert len(seen) > 10
    for path in seen:
        found = path.lstat()
        assert (found.st_uid, found.st_gid) == (user.linux_uid, user.linux_gid), path
    assert stat.S_IMODE((user.home_dir / ".cache/venvs").stat().st_mode) == 0o700


@pytest.mark.host
async def test_what_is_there_is_not_made_again(host: Host, user: IsolatedUser, index: Index) -> None:
    path = await ensure(host, user, "tiny==1.0")
    before = path.stat().st_ino
    assert await ensure(host, user, "tiny==1.0") == path
    await ensure(host, user, "tiny==1.0", service="other")
    assert path.stat().st_ino == before
    assert index.lookups == ["tiny"]
    assert (await run(host, user, "tiny==1.0", service="other")).startswith("1.0 ")


@pytest.mark.host
async def test_a_requirement_by_its_address_needs_no_index(
    host: Host, user: IsolatedUser, wheels: Path, installer: str
) -> None:
    host = having(host, venv_uv=installer, venv_index=None)
    wanted = f"tiny @ {(wheels / 'tiny-2.0-py3-none-any.whl').as_uri()}"
    await ensure(host, user, wanted)
    assert (await run(host, user, wanted)).startswith("2.0 ")


@pytest.mark.host
@pytest.mark.parametrize(
    "damage",
    [
        "rm -rf .cache/venvs/*/.ready-*",
        "rm .cache/venvs/*/bin/python*",
        "ln -sf /nonexistent/python3 .cache/venvs/*/bin/python",
        "rm -rf .cache/venvs/*/pyvenv.cfg .cache/venvs/*/.ready-*",
        "rm -rf .cache",
        "rm sandboxes/api/.venv",
        "ln -sfn ../../.cache/venvs/elsewhere sandboxes/api/.venv",
        "rm -rf .cache/venvs/*; touch .cache/venvs/$NAME",
        "cd .cache/venvs/$NAME; rm -r bin; mkfifo bin; chmod 0 lib .",
    ],
)
async def test_what_is_broken_is_made_anew(host: Host, user: IsolatedUser, damage: str) -> None:
    path = await ensure(host, user, "tiny==1.0")
    as_tenant(user, f"NAME={path.name}; {damage}")
    await missing(host, user, "tiny==1.0")
    assert await ensure(host, user, "tiny==1.0") == path
    assert (await run(host, user, "tiny==1.0")).startswith("1.0 ")
    assert cached(user) == [path.name]


@pytest.mark.host
async def test_an_interpreter_of_another_version_is_not_used(host: Host, user: IsolatedUser) -> None:
    path = await ensure(host, user, "tiny==1.0")
    fake = "#!/bin/sh\\necho True 2.7.18\\n"
    as_tenant(user, f"cd {path}/bin; rm python; printf '{fake}' >python; chmod 700 python")
    await ensure(host, user, "tiny==1.0")
    assert (await run(host, user, "tiny==1.0")).startswith("1.0 ")


@pytest.mark.host
async def test_what_the_tenant_had_there_is_moved_aside(host: Host, user: IsolatedUser) -> None:
    as_tenant(user, "mkdir -p sandboxes/api/.venv; echo mine >sandboxes/api/.venv/mine")
    await ensure(host, user, "tiny==1.0")
    (aside,) = (user.home_dir / "sandboxes/api").glob(".venv.replaced-*")
    assert (aside / "mine").read_text() == "mine\n"
    assert (await run(host, user, "tiny==1.0")).startswith("1.0 ")


# ---- Not at once, not at all


@pytest.mark.host
async def test_of_two_that_need_the_same_one_makes_it(host: Host, user: IsolatedUser, index: Index) -> None:
    index.open.clear()
    making = [asyncio.create_task(ensure(host, user, "tiny==1.0", service=name)) for name in ("one", "two", "three")]
    await asyncio.to_thread(index.asked.wait, 30)
    # All three are at it: one waits for the package, the others for the first one's lock.
    await eventually(lambda: len(host.registry.sandboxes.rows()) == 3)
    index.open.set()
    await asyncio.gather(*making)
    for name in ("one", "two", "three"):
        assert (await run(host, user, "tiny==1.0", service=name)).startswith("1.0 ")
    assert index.lookups == ["tiny"]


@pytest.mark.host
async def test_one_that_was_killed_half_way_is_never_used(
    host: Host, user: IsolatedUser, index: Index, installer: str
) -> None:
    host = having(host, venv_uv=installer)
    index.open.clear()
    stop = Stop()
    making = asyncio.create_task(ensure(host, user, "tiny==1.0", stop=stop))
    assert await asyncio.to_thread(index.asked.wait, 60)
    path = place(host, user, "tiny==1.0")
    assert (path / "bin/python").exists()
    stop.now("the test says so")
    with pytest.raises(StartError, match="the test says so") as caught:
        await making
    assert caught.value.step == "venv"
    assert not processes_of(user.linux_uid)
    index.open.set()
    # Its traces are there, as after a power cut, and do not count, not even for who links to it.
    assert path.exists()
    as_tenant(user, f"ln -s {path} sandboxes/api/.venv")
    await missing(host, user, "tiny==1.0")
    await ensure(host, user, "tiny==1.0")
    assert (await run(host, user, "tiny==1.0")).startswith("1.0 ")
    assert cached(user) == [path.name]


@pytest.mark.host
async def test_a_package_that_is_not_there(host: Host, user: IsolatedUser, installer: str) -> None:
    host = having(host, venv_uv=installer)
    with pytest.raises(StartError, match="no-such-package") as caught:
        await ensure(host, user, "tiny==1.0", "no-such-package==1.0")
    assert caught.value.step == "venv"
    assert caught.value.message.isprintable()
    assert cached(user) == []
    await missing(host, user, "tiny==1.0", "no-such-package==1.0")


@pytest.mark.host
async def test_what_is_said_of_a_failure_is_made_printable_and_bounded(
    host: Host, user: IsolatedUser, wheels: Path
) -> None:
    host = having(host, venv_uv=str(wheels / "uv"))
    long = "printf '\\n\\n\\n'; seq 2000 | tr '\\n' ' '; echo; seq 1000; exit 3"
    _write_program(wheels / "uv", f"seq 1000; printf 'Error: \\033[31mred\\a \\377'; {long}")
    with pytest.raises(StartError, match=r"uv ended with code 3; Error: \?\[31mred\? \S; 1 2 3 .*; 1; 2; 3") as caught:
        await ensure(host, user, "tiny==1.0")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 6000
    # Without one that looks like an error, the end is what tells.
    _write_program(wheels / "uv", "seq 1000; kill -9 $$")
    with pytest.raises(StartError, match=r"uv was killed by signal 9; 989; .*; 1000$"):
        await ensure(host, user, "tiny==1.0")
    _write_program(wheels / "uv", "echo No module named ensurepip; exit 1")
    with pytest.raises(StartError) as caught:
        await ensure(host, user, "tiny==1.0")
    assert caught.value.remedy == "install the Python's ensurepip (Debian: python3-venv), or uv"


def _write_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.host
async def test_a_full_disk(host: Host, user: IsolatedUser, installer: str) -> None:
    host = having(host, venv_uv=installer)
    cache = user.home_dir / ".cache"
    as_tenant(user, "mkdir .cache")
    options = f"size=64k,uid={user.linux_uid},gid={user.linux_gid},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "cache", cache], check=True)
    try:
        with pytest.raises(StartError, match=r"(?i)no space left|os error 28") as caught:
            await ensure(host, user, "tiny==1.0")
        assert caught.value.step == "venv"
        assert cached(user) == []
        await missing(host, user, "tiny==1.0")
        subprocess.run(["mount", "-o", "remount,size=256m", cache], check=True)
        await ensure(host, user, "tiny==1.0")
        assert (await run(host, user, "tiny==1.0")).startswith("1.0 ")
    finally:
        subprocess.run(["umount", "--lazy", cache], check=True)


@pytest.mark.host
async def test_a_uv_that_tenants_cannot_execute_is_not_used(
    host: Host, user: IsolatedUser, tmp_path: Path, wheels: Path
) -> None:
    hidden = tmp_path / "uv"
    hidden.write_text("#!/bin/sh\nexit 1\n")
    hidden.chmod(0o700)
    await ensure(having(host, venv_uv=str(hidden)), user, "tiny==1.0")
    assert (await run(host, user, "tiny==1.0", command=["python", "-m", "pip", "--version"])).startswith("pip ")


@pytest.mark.host
async def test_a_python_that_tenants_cannot_execute(host: Host, user: IsolatedUser, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    python = tmp_path / "python3.11"
    python.symlink_to("/usr/bin/python3")
    hidden = tmp_path / "hidden3.11"
    hidden.write_bytes(Path("/bin/true").read_bytes())
    hidden.chmod(0o755)
    with pytest.raises(StartError, match="cannot execute") as caught:
        await ensure(having(host, venv_python=hidden), user, "tiny==1.0")
    assert (caught.value.step, caught.value.remedy) == (
        "venv",
        "name a Python that tenants can execute in venv_python",
    )


# ---- What is kept


@pytest.mark.host
async def test_of_what_no_service_has_any_more_the_last_few_are_kept(
    host: Host, user: IsolatedUser, wheels: Path
) -> None:
    host = having(host, venv_keep=1)
    for version in ("3.0", "4.0"):
        make_wheel(wheels, "tiny", version)
    made = {}
    for version in ("1.0", "2.0", "3.0"):
        made[version] = await ensure(host, user, f"tiny=={version}")
    await ensure(host, user, "tiny==4.0", service="other")
    made["4.0"] = place(host, user, "tiny==4.0")
    assert cached(user) == sorted(made[version].name for version in ("2.0", "3.0", "4.0"))
    # What is used again counts as used last.
    await ensure(host, user, "tiny==2.0")
    await ensure(host, user, "tiny==4.0")
    assert cached(user) == sorted(made[version].name for version in ("2.0", "4.0"))
    as_tenant(user, "rm -r sandboxes/*; mkdir -m 0 .cache/venvs/half .cache/venvs/.making-x; : >.cache/venvs/.old-x")
    await ensure(having(host, venv_keep=0), user, "tiny==1.0")
    assert cached(user) == [made["1.0"].name]


@pytest.mark.host
async def test_an_export_leaves_them_out(host: Host, user: IsolatedUser, users_base: Path) -> None:
    await ensure(host, user, "tiny==1.0")
    as_tenant(user, "echo kept >sandboxes/api/main.py")
    target = users_base / ".state/archive.tar.gz"
    exported = await asyncio.to_thread(export_home, host, user, target)
    assert sorted(exported.left_out) == [(".cache/venvs", "venv"), ("sandboxes/api/.venv", "venv")]
    assert exported.files == 1


# ---- Tenants who mean no good


@pytest.mark.host
@pytest.mark.parametrize(
    "sabotage",
    [
        ": >.cache",
        "mkdir -p .cache; : >.cache/venvs",
        "mkdir -p .cache; ln -s /proc/self .cache/venvs",
        "mkdir -p .cache; ln -s $CANARY .cache/venvs",
        "ln -s $CANARY .cache",
        "mkdir -p .cache/venvs; chmod 0 .cache/venvs",
        "mkdir -p .cache/venvs/.lock",
        "mkdir -p .cache/venvs; ln -s $CANARY/lock .cache/venvs/.lock",
        "mkdir -p sandboxes; : >sandboxes/api",
        "mkdir -p sandboxes; ln -s $CANARY sandboxes/api",
    ],
)
async def test_a_tenant_who_sabotages_it_hurts_only_itself(
    host: Host, user: IsolatedUser, wheels: Path, sabotage: str
) -> None:
    canary = wheels / "canary"
    canary.mkdir(mode=0o755)
    before = (canary.stat().st_mtime_ns, wheels.stat().st_mtime_ns)
    as_tenant(user, f"CANARY={canary}; {sabotage}")
    with pytest.raises(StartError) as caught:
        await ensure(host, user, "tiny==1.0")
    assert caught.value.message.isprintable()
    await missing(host, user, "tiny==1.0")
    assert (canary.stat().st_mtime_ns, wheels.stat().st_mtime_ns) == before


@pytest.mark.host
async def test_a_tenant_who_holds_the_lock_waits_for_itself(
    host: Host, user: IsolatedUser, supervisor: Supervisor
) -> None:
    as_tenant(user, "mkdir -p .cache/venvs; : >.cache/venvs/.lock")
    source = (
        "import fcntl; lock = open('.cache/venvs/.lock', 'r+'); fcntl.flock(lock, fcntl.LOCK_EX); "
        "print('locked', flush=True); input()"
    )
    holder = subprocess.Popen(
        ["/usr/bin/python3", "-c", source],
        user=user.linux_uid,
        group=user.linux_gid,
        extra_groups=[],
        cwd=user.home_dir,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert await asyncio.to_thread(holder.stdout.readline) == b"locked\n"
        with pytest.raises(StartError, match=r"longer than 0\.5 s"):
            await ensure(having(host, venv_timeout=0.5), user, "tiny==1.0")
        other = await supervisor.users.get_or_create("auth0|other")
        await ensure(host, other, "tiny==1.0")
        assert (await run(host, other, "tiny==1.0")).startswith("1.0 ")
        holder.communicate(b"\n")


@pytest.mark.host
async def test_a_tenant_who_says_that_all_is_well_is_not_believed(host: Host, user: IsolatedUser, index: Index) -> None:
    index.open.clear()
    making = asyncio.create_task(ensure(host, user, "tiny==1.0"))
    assert await asyncio.to_thread(index.asked.wait, 60)
    # The job's own process ends, by the tenant's hand, as if it had been killed for want of memory.
    victims = [pid for pid, cgroup in processes_of(user.linux_uid).items() if "_job-" in cgroup]
    start_as_tenant(user, ["/bin/kill", "-KILL", *map(str, victims)]).wait()
    with pytest.raises(StartError, match=r"killed by signal 9"):
        await making
    await missing(host, user, "tiny==1.0")
