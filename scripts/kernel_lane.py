"""Run the tests that need a cgroup v2 kernel with controllers, in a guest under QEMU: `make test-kernel`.

The guest is Debian with systemd as process 1. Its image depends on the package list and the project's dependencies
only, so it is made once and kept under a hash of both, outside the tree. Each run boots a throw-away snapshot of it,
hands the project over as a tar archive on a second disk, and takes the results back as one from a third. No hardware
virtualisation is needed, and none is used unless PACTOWN_KVM=1 asks for it: where `/dev/kvm` is there, guests may still
hang.

A test that makes the file `REBOOT` has the guest reboot when all tests have run. Those marked `guest(boot=2)` run then.

On a host that itself has the controllers, and root, `--native` runs the same tests without a guest.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

TOP = Path(__file__).resolve().parent.parent
SUITE = "trixie"
PYTHON = "3.13"
"""Debian's suite for the guest, and the Python that it has."""

PACKAGES = (
    "systemd-sysv,dbus,dbus-user-session,libpam-systemd,udev,linux-image-cloud-amd64,initramfs-tools,python3,"
    "procps,util-linux,iproute2,passwd,kmod,crun,bubblewrap,quota,e2fsprogs,curl"
)
TEST_TOOLS = ("pytest", "pytest-asyncio", "hypothesis", "uvloop")
HOST_PACKAGES = {"qemu-system-x86_64": "qemu-system-x86", "mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs"}

RECIPE = 2
"""Counts what else changes in how the image is made."""

MEMORY = "4G"
RESULT_BYTES = 64 << 20
SWAP_BYTES = 512 << 20
BOOT_TIMEOUT = 240.0
"""Seconds in which the guest must have begun the tests; under emulation it takes about 20."""
TEST_TIMEOUT = 1500.0
"""Seconds for everything. Then the guest is killed, and what its console said is printed."""

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


def main(argv: Sequence[str] | None = None) -> int:
    """Build what is missing, boot, test, and say what came of it; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--native", action="store_true", help="run on this host itself, which must have the controllers"
    )
    parser.add_argument("--image-only", action="store_true", help="make the image, and do not boot it")
    parser.add_argument(
        "--can-run", action="store_true", help="exit with 0 if the guest can be had here, and say why not"
    )
    parser.add_argument(
        "--if-possible", action="store_true", help="say why not, and exit with 0, where no guest can be had"
    )
    parser.add_argument("--junit", type=Path, default=TOP / ".cache" / "kernel-junit.xml", help="where the report goes")
    parser.add_argument("args", nargs="*", help="further arguments for pytest")
    options = parser.parse_args(argv)
    # As control-C does: the guest must not outlive whoever started it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if options.can_run:
        problem = why_not()
        print(problem or "the kernel lane can run here")
        return 1 if problem else 0
    if options.native:
        return run_native(options.junit, options.args)
    if options.if_possible and has_controllers():
        say("no guest is booted: this host has the controllers, so its own test run had these tests")
        return 0
    if problem := why_not():
        say(f"NOT RUN: {problem}")
        return 0 if options.if_possible and not must_run() else 1
    install_tools()
    image = make_image()
    return 0 if options.image_only else run_guest(image, options.junit, options.args)


def why_not() -> str | None:
    """Why no guest can be had on this host, or None."""
    missing = [program for program in HOST_PACKAGES if not shutil.which(program)]
    if missing and (os.geteuid() != 0 or not shutil.which("apt-get")):
        return f"needs {', '.join(missing)}; try: apt-get install {' '.join(HOST_PACKAGES[name] for name in missing)}"
    if os.geteuid() != 0:
        return "needs root, to make the guest's file system"
    if os.uname().machine != "x86_64":
        return "the guest is x86-64, and emulating it elsewhere takes too long"
    return None


def must_run() -> bool:
    """Whether this is a CI machine on which nothing excuses a lane that does not run."""
    return os.environ.get("CI") == "true" and (
        os.geteuid() == 0 and Path("/etc/debian_version").exists() and os.uname().machine == "x86_64"
    )


def has_controllers() -> bool:
    """Whether this host itself can run the kernel tests, as `tests/lanes.py` decides it too."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    offered = {word for _, path, kind, *_ in mounts if kind == "cgroup2" for word in controllers_at(Path(path))}
    return os.geteuid() == 0 and offered >= {"memory", "cpu", "pids"}


def controllers_at(mount: Path) -> list[str]:
    """What the top of a cgroup v2 mount offers."""
    try:
        return (mount / "cgroup.controllers").read_text().split()
    except OSError:
        return []


def install_tools() -> None:
    """Install what is missing of the host's tools, and say so."""
    missing = [package for program, package in HOST_PACKAGES.items() if not shutil.which(program)]
    if missing:
        say(f"installing {' '.join(missing)} with apt-get")
        quiet = ["apt-get", "-qq", "-o", "Dpkg::Use-Pty=0"]
        install = [*quiet, "install", "-y", "--no-install-recommends", *missing]
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        if subprocess.run(install, env=environment, check=False).returncode != 0:
            subprocess.run([*quiet, "update"], env=environment, check=True)
            subprocess.run(install, env=environment, check=True)


# The image ----------------------------------------------------------------------------------------------------------


def make_image() -> Path:
    """The guest's directory in the cache, with `root.img`, `vmlinuz` and `initrd`; made if it is not there."""
    wanted = requirements()
    digest = hashlib.sha256("\n".join((SUITE, PACKAGES, UNIT, str(RECIPE), *wanted)).encode()).hexdigest()[:16]
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


# The guest ----------------------------------------------------------------------------------------------------------


def run_guest(image: Path, junit: Path, args: Sequence[str]) -> int:
    """Boot, wait for the power-off, and return pytest's status; 1 if there is none, or if a test was skipped."""
    with tempfile.TemporaryDirectory(prefix="pactown-guest-", dir="/var/tmp") as directory:
        disks = [Path(directory, name) for name in ("project.tar", "results", "swap")]
        pack_project(disks[0], args)
        for disk, size in ((disks[1], RESULT_BYTES), (disks[2], SWAP_BYTES)):
            with disk.open("wb") as file:
                file.truncate(size)
        say("booting the guest")
        began = time.monotonic()
        console = boot(image, disks)
        results = Path(directory, "out")
        try:
            with tarfile.open(disks[1], ignore_zeros=False) as archive:
                archive.extractall(results, filter="data")
            status = int((results / "status").read_text())
        except (tarfile.TarError, OSError, ValueError) as error:
            print(console)
            say(f"the guest brought back no result: {error}")
            return 1
        join(sorted(results.glob("*.xml")), junit)
        return conclude(status, junit, f"in the guest, {time.monotonic() - began:.0f} s with its boot")


def join(reports: Sequence[Path], target: Path) -> None:
    """One JUnit report of several."""
    target.parent.mkdir(parents=True, exist_ok=True)
    suites = ElementTree.Element("testsuites")
    for report in reports:
        suites.extend(ElementTree.parse(report).getroot())
    ElementTree.ElementTree(suites).write(target, encoding="utf-8", xml_declaration=True)


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
        script = RUN.format(args=shlex.join(with_files(args)), reboot=REBOOT).encode()
        info = tarfile.TarInfo(".kernel-lane")
        info.size = len(script)
        archive.addfile(info, io.BytesIO(script))


def boot(image: Path, disks: Sequence[Path]) -> str:
    """Run QEMU until the guest has powered off; return its console, which is printed from the tests' begin on."""
    drives = [f"file={image}/root.img,if=virtio,format=raw,snapshot=on"]
    drives += [f"file={disk},if=virtio,format=raw" for disk in disks]
    command = [
        "qemu-system-x86_64",
        *acceleration(),
        "-smp",
        "2",
        "-m",
        MEMORY,
        "-nographic",
        "-nodefaults",
    ]
    command += ["-serial", "stdio", "-monitor", "none", "-kernel", f"{image}/vmlinuz", "-initrd", f"{image}/initrd"]
    command += ["-append", "console=ttyS0 panic=-1 root=/dev/vda rw psi=1 quiet TERM=dumb systemd.show_status=0"]
    command[-1] += " systemd.mask=serial-getty@ttyS0.service"
    for drive in drives:
        command += ["-drive", drive]
    said: list[str] = []
    began = threading.Event()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as guest:
        timers = [
            threading.Timer(BOOT_TIMEOUT, lambda: None if began.is_set() else guest.kill()),
            threading.Timer(TEST_TIMEOUT, guest.kill),
        ]
        for timer in timers:
            timer.start()
        try:
            assert guest.stdout is not None
            for line in guest.stdout:
                said.append(line)
                if began.is_set():
                    print(line.partition("]: ")[2] or line, end="", flush=True)
                elif "kernel-lane: begin" in line:
                    began.set()
        finally:
            guest.kill()
            for timer in timers:
                timer.cancel()
    return "".join(said)


def acceleration() -> list[str]:
    """KVM where a guest really comes up under it, else emulation. `/dev/kvm` alone proves nothing."""
    probe = [
        "qemu-system-x86_64",
        "-accel",
        "kvm",
        "-nographic",
        "-nodefaults",
        "-S",
        "-monitor",
        "stdio",
        "-no-reboot",
    ]
    if os.environ.get("PACTOWN_KVM") == "1" and os.access("/dev/kvm", os.R_OK | os.W_OK):
        try:
            done = subprocess.run(probe, input=b"quit\n", capture_output=True, timeout=10, check=False)
            if done.returncode == 0:
                return ["-accel", "kvm", "-cpu", "host"]
        except subprocess.TimeoutExpired:
            pass
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]


def with_files(args: Sequence[str]) -> list[str]:
    """Arguments for pytest that choose from the files with kernel tests: importing the others takes half a minute."""
    if any(not word.startswith("-") for word in args):
        return list(args)
    files = sorted(path for path in (TOP / "tests").rglob("test_*.py") if "mark.kernel" in path.read_text())
    return [*args, *(str(path.relative_to(TOP)) for path in files)]


def run_native(junit: Path, args: Sequence[str]) -> int:
    """Run the kernel tests on this host."""
    junit.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-m", "kernel and not guest", f"--junit-xml={junit}", *with_files(args)]
    environment = os.environ | {"PACTOWN_KERNEL_LANE": "1"}
    status = subprocess.run(command, cwd=TOP, env=environment, check=False).returncode
    return conclude(status, junit, "on this host")


def conclude(status: int, junit: Path, where: str) -> int:
    """Say in one line what came of it. 1 if a test was skipped: in this lane nothing may be missing."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    bad = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    for kind, found in bad.items():
        for case in found:
            say(f"{kind}: {case.get('classname')}::{case.get('name')}")
    passed = len(cases) - sum(map(len, bad.values()))
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in bad.items() if found)
    say(f"{passed} passed{', ' * bool(counts)}{counts} ({where})")
    if bad["skipped"]:
        say("a skipped test counts as failed here")
    return status or int(bool(bad["skipped"]))


def run(*command: str) -> None:
    """Run a command; its failure is ours."""
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"kernel lane: failed: {' '.join(command[:3])} ...")


def say(text: str) -> None:
    """Tell what is going on."""
    print(f"kernel lane: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
