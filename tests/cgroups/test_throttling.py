"""How often a quota made a cgroup wait; that the kernel counts so is shown where it has the controller."""

from __future__ import annotations

from pathlib import Path

import pytest

from cgroups import Cgroup, GoneError, NotSupportedError, Throttled, read_throttled
from tests.cgroups.fake import make_fake

STAT = "usage_usec 9\nuser_usec 4\nsystem_usec 5\nnr_periods 70\nnr_throttled 30\nthrottled_usec 4000000\n"


def test_two_looks_make_a_share(fake: Cgroup) -> None:
    before = read_throttled(fake)
    assert before == Throttled(0, 0)
    (fake.path / "cpu.stat").write_text(STAT)
    after = read_throttled(fake.fd)
    assert after == Throttled(30, 4_000_000)
    assert after.share_since(before, 4.0) == pytest.approx(0.75)
    assert after.share_since(before, 2.9) == 1.0
    assert after.share_since(after, 1.0) == 0.0


def test_without_the_controller_there_is_nothing_to_read(tmp_path: Path) -> None:
    with make_fake(tmp_path / "bare.scope", []) as bare, pytest.raises(NotSupportedError, match="CPU controller"):
        read_throttled(bare)


@pytest.mark.host
def test_a_removed_cgroup_cannot_be_read(group: Cgroup) -> None:
    with group.child("a.scope", create=True) as child:
        child.remove()
        with pytest.raises(GoneError):
            read_throttled(child)
