"""Whether this host can do what the runner needs, what it cannot, and the command that mends it.

The checks are plain functions from facts to findings. `examine` gathers the facts. It changes nothing that lasts: as
root it makes one cgroup, starts `/bin/true` in it as a uid that nobody has, and removes it again.
"""

from __future__ import annotations

from ..config import Settings
from .finding import Finding, Status
from .host import check_accounts, check_directories, check_quotas, check_state, check_users_base
from .kernel import check_controllers, check_kernel, check_mount, check_proc, check_sysctls
from .place import check_identity, check_place
from .probe import check_launcher

__all__ = ["Finding", "Status", "examine"]


def examine(settings: Settings) -> list[Finding]:
    """Look at everything, in an order in which what comes first explains what follows."""
    mount, findings = check_mount()
    return [
        *check_kernel(),
        check_identity(),
        *findings,
        *(check_controllers(mount) if mount else ()),
        *(check_place(mount, settings) if mount else ()),
        *check_launcher(mount, settings),
        *check_accounts(settings),
        *check_users_base(settings.users_base),
        *check_quotas(settings),
        *check_directories(settings),
        *check_state(settings),
        *check_proc(),
        *check_sysctls(),
    ]
