"""A pytest plugin: a test that hangs fails after a while, and its fixtures clean up as after any other failure."""

from __future__ import annotations

import signal
from collections.abc import Generator
from types import FrameType
from typing import Any

import pytest

SECONDS = 120.0
"""For each of a test's set-up, call and teardown; `@pytest.mark.deadline(seconds)` gives a test another."""


def _limit(item: pytest.Item) -> Generator[None, Any, Any]:
    marker = item.get_closest_marker("deadline")
    seconds = float(marker.args[0]) if marker else SECONDS

    def over(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"took longer than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _limit(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _limit(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _limit(item))
