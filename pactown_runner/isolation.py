"""The synchronous face: users, their homes, and single programs run as one of them. No event loop, no supervisor.

What it does for a user it does as the supervisor does, with the same modules, and beside one on the same state.
"""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .archives import export_home, import_home
from .config import DEFAULT_USERS_BASE, Settings
from .deletion import delete_user
from .errors import NotFoundError, TreeError
from .host import Host
from .launcher import Directory, LaunchSpec, launch_popen
from .models import IsolatedUser
from .owners import Owner
from .programs import tenant_environment
from .registry import Registry
from .scoped_popen import ScopedPopens
from .specs import argv_of, check_command, check_service_id
from .standings import Standings
from .supervisor_users import UserStats
from .trees import open_tree
from .usage import UsageMeter, make_sandbox_directory
from .users import Users

__all__ = ["UserIsolationManager", "get_isolation_manager"]


class UserIsolationManager:
    """One Linux user for each SaaS user, with a home of its own.

    Usable from any number of threads, and beside other managers and supervisors of the same state. As root each user is
    an account; otherwise users are names, and their files and processes are the caller's.

    Args:
        users_base: where homes are. If it is the default, `PACTOWN_USERS_BASE` counts, and the other settings do.
        enable_cgroups: whether the settings' `default_limits` hold for what `run_as_user` starts. A cgroup of its own
            it has in any case, where there is a place for one.

    Raises:
        RunnerError: the state cannot be opened, or, as root, there is no place for cgroups.
    """

    def __init__(self, users_base: Path = DEFAULT_USERS_BASE, enable_cgroups: bool = False) -> None:
        given = None if Path(users_base) == DEFAULT_USERS_BASE else Path(users_base)
        self._settings = settings = Settings.load(users_base=given)
        self.users_base = settings.users_base
        self.enable_cgroups = enable_cgroups
        self._held = ExitStack()
        self._runs: ScopedPopens | None = None
        self._lock = threading.Lock()
        with ExitStack() as held:
            self._registry = held.enter_context(Registry(settings.state_dir / "registry.db"))
            self._users = Users(settings, self._registry)
            self._owner = held.enter_context(Owner(settings.state_dir))
            self._host, self._refusal = self._open_host(held)
            self._meter = UsageMeter(self._host)
            self._held = held.pop_all()

    def _open_host(self, held: ExitStack) -> tuple[Host | None, TreeError | None]:
        settings, standings = self._settings, Standings(self._settings, self._registry)
        try:
            tree = open_tree(
                cgroup_slice=settings.cgroup_slice,
                state_id=self._registry.state_id,
                tenant_limits=standings.tenant_limits,
            )
        except TreeError as error:
            if settings.root_mode:
                raise
            return None, error
        held.callback(tree.close)
        host = Host(
            settings=settings,
            registry=self._registry,
            users=self._users,
            standings=standings,
            tree=tree,
            owner=self._owner,
        )
        return host, None

    def close(self) -> None:
        """Let go of the state. What `run_as_user` started and still runs is ended."""
        with self._lock:
            runs, self._runs = self._runs, None
        if runs is not None:
            runs.close()
        self._held.close()

    def __enter__(self) -> UserIsolationManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Users

    def get_or_create_user(self, saas_user_id: str) -> IsolatedUser:
        """The user of this id; an account and a home are made if there is none.

        Raises:
            SpecError: the id is malformed.
            AccountError: the account cannot be made, or is not what it was.
        """
        return self._users.get_or_create(saas_user_id)

    def get_user(self, saas_user_id: str) -> IsolatedUser | None:
        """The user of this id, or None. Makes nothing."""
        return self._users.get(saas_user_id)

    def list_users(self) -> list[IsolatedUser]:
        """All users, oldest first."""
        return self._users.list()

    def get_sandbox_path(self, saas_user_id: str, service_id: str) -> Path:
        """The directory of a service in the user's home; both are made if they are missing.

        Raises:
            SpecError: the service id is malformed.
            StartError: the user has put something else there.
        """
        check_service_id(service_id)
        user = self._users.get_or_create(saas_user_id)
        path = user.home_dir / "sandboxes" / service_id
        if self._host is not None:
            make_sandbox_directory(self._host, user, service_id)
        else:
            # Without root all homes are the caller's own.
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def get_user_stats(self, saas_user_id: str) -> dict[str, Any]:
        """What a user has: `user` (its id and login), `sandbox_count`, and `total_size_mb` on the disk.

        Raises:
            NotFoundError: there is no such user.
            FilesError: its home could not be counted in time.
        """
        user = self._known(saas_user_id)
        return UserStats(user, self._meter.usage(user)).to_dict()

    # Programs

    def run_as_user(
        self, saas_user_id: str, command: str, cwd: Path, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a command as the user, who is made if there is none.

        The program gets no environment but the user's own and `env`; `/bin/sh -c` runs it. It is born in a cgroup of
        its own, and when it has ended whatever it left there is killed. With the manager all of it ends.

        Args:
            cwd: entered as the user.

        Returns:
            The program itself, with pipes for its standard output and error.

        Raises:
            SpecError: the command or a variable is malformed.
            StartError: it could not be started, or not in time, since the user's own processes can hold it up; `step`
                says where it failed.
            LimitsError: with `enable_cgroups`, a limit cannot be enforced on this host.
            StateError: the user's home is being exported or imported.
        """
        check_command(command)
        user = self._users.get_or_create(saas_user_id)
        spec = LaunchSpec(
            argv=argv_of(command),
            mode="root" if self._users.root_mode else "user",
            uid=user.linux_uid,
            gid=user.linux_gid,
            env={**tenant_environment(user), **(env or {})},
            directories=[Directory(user.home_dir), Directory(os.fspath(cwd))],
        )
        if self._host is None:
            if self.enable_cgroups and self._settings.default_limits:
                raise self._placing_error()
            popen, _ = launch_popen(spec, None, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            return popen
        return self._looked_after(self._host).start(user, spec, limited=self.enable_cgroups)

    def _looked_after(self, host: Host) -> ScopedPopens:
        with self._lock:
            if self._runs is None:
                self._runs = ScopedPopens(host)
            return self._runs

    # Data

    def export_user_data(self, saas_user_id: str, output_path: Path) -> bool:
        """Write the user's home into an archive (`tar.gz`), for `import_user_data` on this or another host.

        What runs of the user's stands still meanwhile. The archive appears whole, or not at all.

        Returns:
            False if there is no such user.

        Raises:
            ArchiveError: it could not be written.
            StateError: another export or import is on, or something did not stand still.
        """
        user = self._users.get(saas_user_id)
        if user is None:
            return False
        export_home(self._placed(), user, Path(output_path))
        return True

    def import_user_data(self, saas_user_id: str, archive_path: Path) -> bool:
        """Replace the user's home by what an archive holds; the user is made if there is none.

        Returns:
            True. What fails raises, and leaves the home as it was.

        Raises:
            ArchiveError: the archive was refused, or cannot be read.
            StateError: something of the user's runs.
        """
        host = self._placed()
        import_home(host, self._users.get_or_create(saas_user_id), Path(archive_path))
        return True

    def delete_user(self, saas_user_id: str, delete_home: bool = True) -> bool:
        """End what runs as the user, and remove the account and what it left on this host.

        Args:
            delete_home: if False the home stays, root's from now on, and a later user of the same id gets it back.

        Returns:
            False if there is no such user.

        Raises:
            AccountError: the account is not what it was.
            StateError: a supervisor or another manager runs something for it, or it could not be ended or removed yet;
                the call may be repeated.
        """
        host, user = self._placed(), self._users.get(saas_user_id)
        if user is not None:
            self._looked_after(host).end(user.key)
        try:
            delete_user(host, saas_user_id, delete_home=delete_home)
        except NotFoundError:
            return False
        return True

    # Help

    def _known(self, saas_user_id: str) -> IsolatedUser:
        user = self._users.get(saas_user_id)
        if user is None:
            raise NotFoundError(f"there is no user {saas_user_id!r}")
        return user

    def _placed(self) -> Host:
        if self._host is None:
            raise self._placing_error()
        return self._host

    def _placing_error(self) -> TreeError:
        assert self._refusal is not None
        return TreeError(self._refusal.message, remedy=self._refusal.remedy)


_manager: UserIsolationManager | None = None
_pid = 0
_making = threading.Lock()


def get_isolation_manager() -> UserIsolationManager:
    """The manager of this process, made when it is first asked for, with the settings of this host."""
    global _manager, _pid
    with _making:
        # A child made by `fork` has none of the parent's threads, and may not use its database.
        if _manager is None or _pid != os.getpid():
            _manager, _pid = UserIsolationManager(), os.getpid()
        return _manager
