"""Run the tests that need a cgroup v2 kernel with controllers, in guests under QEMU: `make test-kernel`.

A guest is Debian with systemd as process 1 (`image`). Each boots a throw-away snapshot of one image, is handed the
project as a tar archive on a second disk, and gives the results back as one on a third (`guest`). No hardware
virtualisation is needed, and none is used unless PACTOWN_KVM=1 asks for it: where `/dev/kvm` is there, guests may still
hang.

Two guests run at once. What is measured is measured in the first one. Files of tests that measure nothing, marked
`beside`, run in the second, which yields the host's CPUs to the first. With arguments for pytest there is one guest.

A test that makes the file `REBOOT` has its guest reboot when all tests have run. Those marked `guest(boot=2)` run then.

On a host that itself has the controllers, and root, `--native` runs the same tests without a guest.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["TOP", "say"]

TOP = Path(__file__).resolve().parent.parent.parent
"""The project's directory."""


def say(text: str) -> None:
    """Tell what is going on, apart from what the tests print."""
    print(f"kernel lane: {text}", file=sys.stderr, flush=True)
