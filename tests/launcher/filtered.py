"""Run starts in processes of their own, under a seccomp filter or another identity.

A filter makes the kernel itself refuse a system call, or claim a success that never was: the real launcher meets it as
it would in a container. It cannot be taken off again, hence the processes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pactown_runner.errors import StartError
from pactown_runner.launcher import Directory, LaunchSpec, launch_popen, launcher_path
from pactown_runner.launcher import call as launcher_call

PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 1 << 14, 1 << 18
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
NUMBERS = {  # asm/unistd.h: x86-64, arm64
    "capset": (126, 91),
    "clone3": (435, 435),
    "close_range": (436, 436),
    "clone": (56, 220),
    "execve": (59, 221),
    "getresuid": (118, 148),
    "keyctl": (250, 219),
    "openat": (257, 56),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "rt_sigaction": (13, 134),
    "setgroups": (116, 159),
    "setpriority": (141, 140),
    "setregid": (114, 143),
    "setresgid": (119, 149),
    "setresuid": (117, 147),
    "setsid": (112, 157),
    "setuid": (105, 146),
    "unshare": (272, 97),
}


def install_filter(call: str, first_argument: int | None, errno: int) -> None:
    """Make `call`, with that first argument if one is given, return `errno` and do nothing; 0 claims success."""
    number = NUMBERS[call][platform.machine() == "aarch64"]

    def step(code: int, if_true: int, if_false: int, value: int) -> bytes:
        return struct.pack("<HBBI", code, if_true, if_false, value)

    argument = [] if first_argument is None else [step(LOAD, 0, 0, 16), step(JUMP_IF_EQUAL, 0, 1, first_argument)]
    program = [
        step(LOAD, 0, 0, 0),
        step(JUMP_IF_EQUAL, 0, 1 + len(argument), number),
        *argument,
        step(RETURN, 0, 0, ERRNO | errno),
        step(RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(program))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(header)) != 0:
        raise OSError(ctypes.get_errno(), "cannot install a seccomp filter")


def hide_proc() -> None:
    """Mount an empty directory over /proc, for this process and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(CLONE_NEWNS) != 0
        # Not "/", which is no mount point in a chroot.
        or libc.mount(b"none", b"/proc", None, MS_REC | MS_PRIVATE, None) != 0
        or libc.mount(b"none", b"/proc", b"tmpfs", 0, None) != 0
    ):
        raise OSError(ctypes.get_errno(), "cannot hide /proc")


def start(case: dict[str, Any]) -> dict[str, Any]:
    if case.get("filter"):
        install_filter(*case["filter"])
    if case.get("hide_proc"):
        hide_proc()
    if "launcher" in case:
        launcher_call._BINARY = Path(case["launcher"])
    if uid := case.get("uid"):
        os.setgroups(case.get("groups", []))
        os.setresgid(uid, uid, uid)
        os.setresuid(*case.get("uids", (uid, uid, uid)))
    options = case["spec"]
    options["directories"] = [Directory(path) for path in options.get("directories", ["/"])]
    options["namespaces"] = frozenset(options.get("namespaces", ()))
    cgroup = case.get("cgroup_fd")
    try:
        popen, report = launch_popen(LaunchSpec(**options), cgroup, stdout=subprocess.PIPE)
    except StartError as error:
        return {"step": error.step, "errno": error.errno, "message": str(error)}
    text = popen.communicate()[0].decode()
    return {"step": None, "report": dataclasses.asdict(report), "stdout": text, "code": popen.returncode}


def in_a_child(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case in a fork of this process; return what came of it.

    A case may have `filter` (call, first argument or None, errno), `hide_proc`, `uid` with `groups` and `uids`, and
    `cgroup_fd`; `spec` has the arguments of a `LaunchSpec`.
    """
    with tempfile.TemporaryDirectory() as directory:
        if "uid" in case:
            # A checkout below /root cannot be reached without root, and then neither can its launcher.
            os.chmod(directory, 0o755)
            case = {**case, "launcher": shutil.copy(launcher_path(), directory)}
        return _in_a_child(case)


def _in_a_child(case: dict[str, Any]) -> dict[str, Any]:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = start(case)
        except BaseException as error:
            result = {"error": repr(error)}
        os.write(write_end, json.dumps(result).encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    outcome = dict(json.loads(text))
    assert "error" not in outcome, outcome
    return outcome
