"""Tar streams of the operator's own files, as tar itself reads them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from tarfile import RECORDSIZE

from pactown_runner.homes.packing import Survey, pack


def test_tar_may_be_gone_before_all_of_the_end_is_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("one")
    ended = False
    with subprocess.Popen(["tar", "--list", "--file=-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as tar:
        assert tar.stdin is not None
        fd, sent = tar.stdin.fileno(), 0

        def write(data: bytes | memoryview) -> None:
            # As into a pipe that is full again after every record, whose reader is quicker than its writer.
            nonlocal sent, ended
            while data:
                count = os.write(fd, data[: RECORDSIZE - sent % RECORDSIZE])
                data, sent = data[count:], sent + count
                if sent == RECORDSIZE:
                    assert tar.wait(30) == 0
                    ended = True

        assert pack(tmp_path, write) == Survey(True, 1, 3)
        assert ended
        assert tar.stdout is not None
        assert tar.stdout.read() == b"a\n"
