"""What of a login lies in directories of the system's that run or keep something for users: cron, at, mail, linger.

These directories are the system's own. Names in them are removed, never followed or opened; so it does not matter what
somebody may have put under them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["remove_mail", "remove_schedules"]

_log = logging.getLogger(__name__)

_BY_LOGIN = ("var/spool/cron/crontabs", "var/spool/cron", "var/spool/cron/tabs", "var/lib/systemd/linger")
"""Debian, Fedora and SUSE keep crontabs in these; logind(8) notes in the last one who may run without logging in."""

_BY_OWNER = ("var/spool/cron/atjobs", "var/spool/at", "var/spool/atjobs")
"""The same for jobs of at(1)."""

_MAIL = ("var/mail", "var/spool/mail")

_STOP_SECONDS = 60


def remove_schedules(login: str, uid: int, root: Path = Path("/")) -> list[str]:
    """Remove what would start something as this user later, or keeps it logged in; returns the paths of what that was.

    Args:
        root: where the host's tree begins.
    """
    removed = [path for directory in _BY_LOGIN for path in _remove(root / directory, [login], uid)]
    removed += [path for directory in _BY_OWNER for path in _remove(root / directory, None, uid)]
    if (root / "run/systemd/system").is_dir():
        _stop_manager(uid)
    return removed


def remove_mail(login: str, uid: int, root: Path = Path("/")) -> list[str]:
    """Remove the user's mail; returns its paths."""
    return [path for directory in _MAIL for path in _remove(root / directory, [login], uid)]


def _remove(directory: Path, names: Sequence[str] | None, uid: int) -> list[str]:
    """Remove files of these names, or all, that belong to this uid; of names alone also what is root's."""
    try:
        top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return []
    removed = []
    owners = {uid} if names is None else {uid, 0}
    try:
        for name in os.listdir(top) if names is None else names:
            path = str(directory / name)
            try:
                found = os.stat(name, dir_fd=top, follow_symlinks=False)
                if found.st_uid in owners and not stat.S_ISDIR(found.st_mode):
                    os.unlink(name, dir_fd=top)
                    removed.append(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                _log.warning("cannot remove %s of uid %d: %s", path, uid, error.strerror)
    finally:
        os.close(top)
    return removed


def _stop_manager(uid: int) -> None:
    """Stop the user's own service manager, which systemd starts for a login, and remove its `/run/user/<uid>`."""
    units = (f"user@{uid}.service", f"user-runtime-dir@{uid}.service")
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        # Killing them is the caller's business; this keeps them from being started anew.
        subprocess.run(
            ["systemctl", "stop", "--", *units],  # noqa: S607 - root's own PATH
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_STOP_SECONDS,
        )
