"""The guest's image: Debian with systemd as process 1, and what the tests import; made once, and kept in a cache.

It depends on the package list and the project's dependencies only, and is kept outside the tree under a hash of both.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from . import TOP, say

__all__ = ["make_image"]

SUITE = "trixie"
PYTHON = "3.13"
"""Debian's suite for the guest, and the Python that it has."""

PACKAGES = (
    "systemd-sysv,dbus,dbus-user-session,libpam-systemd,udev,linux-image-cloud-amd64,initramfs-tools,python3,"
    "procps,util-linux,iproute2,passwd,kmod,crun,bubblewrap,quota,e2fsprogs,curl"
)
TEST_TOOLS = ("pytest", "pytest-asyncio", "hypothesis", "uvloop")

MASKED = (
    "e2scrub_reap.service",
    "getty@.service",
    "modprobe@configfs.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
)
"""Units that no test needs: under emulation each costs half a second of the boot."""

RECIPE = 3
"""Counts what else changes in how the image is made."""

UNIT = """\
[Unit]
Description=Kernel tests of pactown-runner
After=multi-user.target

[Service]
Type=oneshot
Delegate=yes
StandardOutput=journal+console
StandardError=journal+console
ExecStartPre=/usr/bin/mkdir -p /srv/project /srv/results
ExecStartPre=/usr/bin/tar -xf /dev/vdb -C /srv/project
ExecStart=/bin/sh /srv/project/.kernel-lane
ExecStopPost=/usr/bin/systemctl --no-block poweroff

[Install]
WantedBy=default.target
"""


def make_image() -> Path:
    """The image's directory in the cache, with `root.img`, `vmlinuz` and `initrd`; made if it is not there."""
    wanted = requirements()
    digest = hashlib.sha256("\n".join((SUITE, PACKAGES, UNIT, *MASKED, str(RECIPE), *wanted)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pactown-runner"
    image = cache / f"guest-{digest}"
    if image.is_dir():
        return image
    say(f"making the guest's image ({SUITE}); later runs find it in {cache}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pactown-guest-", dir="/var/tmp") as directory:
        root, made = Path(directory, "root"), Path(directory, "image")
        bootstrap(root)
        install_dependencies(root, wanted)
        # Nothing is left for the first boot to bring up to date, see systemd-update-done(8).
        for part in ("etc", "var"):
            (root / part / ".updated").touch()
        made.mkdir()
        shutil.copy(root / "vmlinuz", made / "vmlinuz")
        shutil.copy(root / "initrd.img", made / "initrd")
        run("mke2fs", "-q", "-t", "ext4", "-O", "^quota", "-d", str(root), str(made / "root.img"), "3G")
        # Whole or not at all: the name is given last.
        staged = Path(tempfile.mkdtemp(prefix="new-", dir=cache))
        shutil.copytree(made, staged / "image")
        (staged / "image").rename(image)
        staged.rmdir()
    for old in cache.glob("guest-*"):
        if old != image:
            shutil.rmtree(old)
    return image


def requirements() -> list[str]:
    """What the guest needs from the package index: the project's dependencies, all extras, and the test tools."""
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return sorted({*project["dependencies"], *(x for x in extras if not x.startswith(project["name"])), *TEST_TOOLS})


def bootstrap(root: Path) -> None:
    """Unpack Debian into `root`, from wherever this host's own apt gets it."""
    sources = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(LABEL) $(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    )
    mirrors = [line.split()[2] for line in sources.stdout.splitlines() if line.startswith("Debian Debian ")]
    source = [f"deb {mirrors[0]} {SUITE} main"] if mirrors else []
    run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root), *source)
    (root / "etc/fstab").write_text("/dev/vda / ext4 rw 0 1\n")
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/systemd/system/kernel-tests.service").write_text(UNIT)
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    wants = root / "etc/systemd/system/default.target.wants"
    wants.mkdir(parents=True, exist_ok=True)
    (wants / "kernel-tests.service").symlink_to("../kernel-tests.service")


def install_dependencies(root: Path, wanted: list[str]) -> None:
    """Put wheels for the guest's Python into its `/opt/site`; this host's pip fetches them."""
    tags = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
    platforms = [f"--platform={tag}" for tag in tags]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "-qq",
        "--disable-pip-version-check",
        "install",
        "--root-user-action=ignore",
    ]
    run(*pip, f"--target={root}/opt/site", f"--python-version={PYTHON}", "--only-binary=:all:", *platforms, *wanted)
    # Under emulation it takes long, and whoever cannot write there would do it at every start.
    run("chroot", str(root), "python3", "-m", "compileall", "-q", "/opt/site")


def run(*command: str) -> None:
    """Run a command; its failure is ours."""
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"kernel lane: failed: {' '.join(command[:3])} ...")
