"""Every error that this package raises on purpose.

One small tree. Each class has a stable `code` for machines (the CLI's `--json` and the API carry it), a message
for people that says what could not be done and why, and where something can be done about it a `remedy`.
"""

from __future__ import annotations

__all__ = [
    "AccountError",
    "AdmissionError",
    "AlreadyRunningError",
    "BlockedError",
    "ConfigError",
    "FilesError",
    "LauncherError",
    "LimitsError",
    "NotFoundError",
    "RegistryError",
    "RunnerError",
    "SpecError",
    "StartError",
    "StateError",
    "TreeError",
]


class RunnerError(Exception):
    """Base of all errors of this package.

    Attributes:
        code: a stable, machine-readable name of the kind of error.
        remedy: what the reader can do about it, or None.
    """

    code = "runner-error"

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy

    @property
    def message(self) -> str:
        """What could not be done, and why; without the remedy."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class SpecError(RunnerError, ValueError):
    """A request that can never be right: a malformed id, a NUL in an argument, an unknown limit."""

    code = "bad-spec"


class ConfigError(RunnerError, ValueError):
    """A setting that is unknown, malformed, or not usable on this host."""

    code = "bad-config"


class NotFoundError(RunnerError, LookupError):
    """No such user or sandbox."""

    code = "not-found"


class AlreadyRunningError(RunnerError):
    """This user's service is running already, here or under another owner of the same state."""

    code = "already-running"


class AdmissionError(RunnerError):
    """A start is refused that would be right at another time: a cap, a rate, or what the host has left.

    Attributes:
        limit: what stands in the way: the setting of that name, or `descriptors`.
        retry_after: seconds until a start rate allows the next one. None if nobody can know: as soon as other sandboxes
            have ended, or somebody has given the supervisor more.
    """

    code = "refused"

    def __init__(
        self, message: str, *, limit: str, retry_after: float | None = None, remedy: str | None = None
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.limit = limit
        self.retry_after = retry_after


class BlockedError(AdmissionError):
    """The operator has blocked this tenant: nothing is started for it, and what runs stands still."""

    code = "blocked"

    def __init__(self, message: str) -> None:
        super().__init__(message, limit="blocked", remedy="have the operator unblock the tenant")


class StateError(RunnerError):
    """The operation does not fit the state that the sandbox or supervisor is in."""

    code = "wrong-state"


class RegistryError(RunnerError):
    """The registry cannot be opened or read, or has a schema that this version does not know."""

    code = "registry"


class AccountError(RunnerError):
    """A Linux account could not be made, or is not what the registry says it is."""

    code = "account"


class TreeError(RunnerError):
    """This host offers no cgroup v2 tree in which sandboxes could be placed."""

    code = "no-cgroup-tree"


class LimitsError(RunnerError):
    """A limit was asked for that this kernel, host or tree cannot enforce, or that was refused."""

    code = "limit-not-enforceable"


class LauncherError(RunnerError):
    """The launcher program is missing, or broke its protocol."""

    code = "launcher"


class StartError(RunnerError):
    """A program could not be started; nothing of it is left.

    Attributes:
        step: the launcher's step that failed, such as `chdir` or `execve`.
        errno: the kernel's error number for it, 0 if there is none.
    """

    code = "failed-to-start"

    def __init__(self, message: str, *, step: str, errno: int = 0, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.step = step
        self.errno = errno


class FilesError(RunnerError):
    """Files could not be put into or got out of a sandbox."""

    code = "files"
