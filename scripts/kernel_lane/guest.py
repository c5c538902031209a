"""One guest: booted with the project and what it is to test, until it has powered off and given the results back."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

from . import TOP, say

__all__ = ["Guest", "Results"]

MEMORY = "3G"
RESULT_BYTES = 64 << 20
SWAP_BYTES = 512 << 20
BOOT_TIMEOUT = 240.0
"""Seconds in which the guest must have begun the tests; under emulation it takes about 20."""
TEST_TIMEOUT = 1500.0
"""Seconds for everything. Then the guest is killed, and what its console said is printed."""

REBOOT = "/srv/results/reboot"

RUN = """\
export PACTOWN_KERNEL_LANE=1 PACTOWN_GUEST=1 HOME=/root
dmesg --console-level emerg
mkswap -q /dev/vdd && swapon /dev/vdd
cd /srv/project
run_tests() {{ # NAME ARGUMENT...
    name=$1 && shift
    python3 -m pytest -p no:cacheprovider --junit-xml="/srv/results/$name.xml" "$@" 2>&1
    status=$?
    journalctl --no-pager -b >"/srv/results/$name.journal" 2>&1
}}
if [ -e {reboot} ]; then
    rm {reboot}
    run_tests boot-2 -m 'guest(boot=2)' $(grep -l 'guest(boot=2)' tests/kernel/*.py)
    [ $status = 0 ] || echo $status >/srv/results/status
elif [ -e /srv/results/began ]; then
    echo kernel-lane: the guest died, and started anew
else
    touch /srv/results/began
    packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$packages" && echo /opt/site >"$packages/kernel-lane.pth"
    sync
    echo kernel-lane: begin
    run_tests boot-1 -m 'kernel and not guest(boot=2)' {args}
    echo $status >/srv/results/status
    if [ -e {reboot} ]; then
        echo kernel-lane: reboot
        exec systemctl --no-block reboot
    fi
fi
tar -cf /dev/vdc -C /srv/results .
sync
"""
"""Goes with the project, so that a change of it needs no new image."""


class Results(NamedTuple):
    """What a guest gave back.

    Attributes:
        status: pytest's.
        reports: JUnit files, one of each boot.
    """

    status: int
    reports: Sequence[Path]


class Guest:
    """A guest, for as long as the `with` lasts.

    Args:
        image: the directory that `make_image` gives.
        args: for pytest.
        name: begins each line that is printed of what its tests print.
        cpus: how many it has.
        niceness: of nice(1).
    """

    def __init__(self, image: Path, args: Sequence[str], *, name: str = "", cpus: int = 2, niceness: int = 0) -> None:
        self._image = image
        self._args = args
        self._name = name
        self._cpus = cpus
        self._niceness = niceness
        self._held = ExitStack()
        self._console: list[str] = []
        self._booted = threading.Event()

    def __enter__(self) -> Self:
        with ExitStack() as held:
            self._directory = Path(
                held.enter_context(tempfile.TemporaryDirectory(prefix="pactown-guest-", dir="/var/tmp"))
            )
            disks = [self._directory / name for name in ("project.tar", "results", "swap")]
            pack_project(disks[0], self._args)
            for disk, size in ((disks[1], RESULT_BYTES), (disks[2], SWAP_BYTES)):
                with disk.open("wb") as file:
                    file.truncate(size)
            self._began = time.monotonic()
            self._qemu = subprocess.Popen(
                ["nice", "-n", str(self._niceness), *machine(self._image, disks, self._cpus)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            held.callback(self._end)
            self._reader = threading.Thread(target=self._read_console, daemon=True)
            self._reader.start()
            self._held = held.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._held.close()

    def results(self) -> Results | None:
        """Wait for its power-off, and return what came of it; None if it brought nothing back, which is told."""
        if self._booted.wait(BOOT_TIMEOUT):
            self._reader.join(TEST_TIMEOUT - (time.monotonic() - self._began))
        self._end()
        self._reader.join()
        given = self._directory / "out"
        try:
            with tarfile.open(self._directory / "results", ignore_zeros=False) as archive:
                archive.extractall(given, filter="data")
            return Results(int((given / "status").read_text()), sorted(given.glob("*.xml")))
        except (tarfile.TarError, OSError, ValueError) as error:
            print("".join(self._console))
            say(f"the guest {self._name} brought back no result: {error}")
            return None

    def _read_console(self) -> None:
        """Print what it says from the tests' begin on, until it has powered off."""
        assert self._qemu.stdout is not None
        for line in self._qemu.stdout:
            self._console.append(line)
            if self._booted.is_set():
                print(self._name + (line.partition("]: ")[2] or line), end="", flush=True)
            elif "kernel-lane: begin" in line:
                self._booted.set()
        self._booted.set()

    def _end(self) -> None:
        self._qemu.kill()
        self._qemu.wait()


def pack_project(target: Path, args: Sequence[str]) -> None:
    """Everything that git tracks or would, and the launcher that was built here: it is static."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TOP,
        capture_output=True,
        check=True,
    )
    names = [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    with tarfile.open(target, "w") as archive:
        for name in (*names, "pactown_runner/launcher/launch"):
            if (TOP / name).exists():
                archive.add(TOP / name, name, recursive=False)
        script = RUN.format(args=shlex.join(args), reboot=REBOOT).encode()
        info = tarfile.TarInfo(".kernel-lane")
        info.size = len(script)
        archive.addfile(info, io.BytesIO(script))


def machine(image: Path, disks: Sequence[Path], cpus: int) -> list[str]:
    """The command of QEMU."""
    command = ["qemu-system-x86_64", *acceleration(), "-smp", str(cpus), "-m", MEMORY]
    command += ["-nographic", "-nodefaults", "-serial", "stdio", "-monitor", "none"]
    command += ["-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd", "-append"]
    command += [
        "console=ttyS0 panic=-1 root=/dev/vda rw psi=1 quiet TERM=dumb systemd.show_status=0 "
        "systemd.mask=serial-getty@ttyS0.service lsm=landlock,lockdown,yama,integrity"
    ]
    drives = [f"file={image}/root.img,if=virtio,format=raw,snapshot=on"]
    drives += [f"file={disk},if=virtio,format=raw" for disk in disks]
    for drive in drives:
        command += ["-drive", drive]
    return command


def acceleration() -> list[str]:
    """KVM where a guest really comes up under it, else emulation. `/dev/kvm` alone proves nothing."""
    probe = ["qemu-system-x86_64", "-accel", "kvm", "-nographic", "-nodefaults", "-S", "-monitor", "stdio"]
    if os.environ.get("PACTOWN_KVM") == "1" and os.access("/dev/kvm", os.R_OK | os.W_OK):
        try:
            done = subprocess.run(probe, input=b"quit\n", capture_output=True, timeout=10, check=False)
            if done.returncode == 0:
                return ["-accel", "kvm", "-cpu", "host"]
        except subprocess.TimeoutExpired:
            pass
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]
