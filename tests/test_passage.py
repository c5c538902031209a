"""Who could put another directory in the place of one of ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pactown_runner.database import private_dir
from pactown_runner.errors import RegistryError, RunnerError
from pactown_runner.home_dirs import make_home
from pactown_runner.logs import LogError, LogPaths
from pactown_runner.passage import exposed
from pactown_runner.registry import Registry

pytestmark = pytest.mark.host

NOBODY = 65534


@pytest.fixture
def middle(tmp_path: Path) -> Path:
    path = tmp_path / "middle"
    path.mkdir(0o755)
    return path


@pytest.mark.parametrize(
    ("uid", "gid", "mode", "safe"),
    [
        (0, 0, 0o755, True),
        (0, 0, 0o775, True),
        (0, NOBODY, 0o755, True),
        (0, NOBODY, 0o1777, True),
        (0, NOBODY, 0o775, False),
        (0, 0, 0o757, False),
        (NOBODY, 0, 0o700, False),
        (NOBODY, 0, 0o1700, False),
    ],
)
def test_what_others_can_change(middle: Path, uid: int, gid: int, mode: int, safe: bool) -> None:
    os.chown(middle, uid, gid)
    middle.chmod(mode)
    (middle / "below").mkdir()
    for path in (middle / "state", middle / "below/state"):
        reason = exposed(path)
        assert (reason is None) is safe
        assert safe or str(middle) in str(reason)
    # Of the directory itself others ask.
    assert exposed(middle) is None


def test_each_link_on_the_way_is_followed(tmp_path: Path, middle: Path) -> None:
    (tmp_path / "safe").mkdir()
    (middle / "link").symlink_to("../safe")
    (tmp_path / "first").symlink_to("middle/link")
    path = tmp_path / "first/state"
    assert exposed(path) is None
    middle.chmod(0o777)
    assert str(middle) in str(exposed(path))


def test_a_link_to_itself_is_no_way(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        exposed(tmp_path / "loop/state")


@pytest.mark.parametrize(
    ("use", "error"),
    [
        (private_dir, RegistryError),
        (lambda path: Registry(path / "registry.db"), RegistryError),
        (lambda path: LogPaths(path / "log", path / "run", "").prepare(), LogError),
        (lambda path: make_home(path, "pactown_00000000", 1, 1), RunnerError),
    ],
    ids=["directory", "registry", "logs", "homes"],
)
@pytest.mark.parametrize("owner", [(NOBODY, 0, 0o755), (0, NOBODY, 0o775)], ids=["owner", "group"])
def test_nothing_is_kept_where_others_can_replace_it(
    middle: Path, use: Callable[[Path], object], error: type[RunnerError], owner: tuple[int, int, int]
) -> None:
    os.chown(middle, *owner[:2])
    middle.chmod(owner[2])
    with pytest.raises(error, match="others than root can change") as caught:
        use(middle / "state")
    assert caught.value.remedy is not None
