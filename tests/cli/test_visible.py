"""What of a tenant's bytes reaches a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pactown_runner.cli.human import duration_of, size_of
from pactown_runner.cli.visible import one_line, visible


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"plain text\n\tindented", b"plain text\n\tindented"),
        ("é 漢字 🙂".encode(), "é 漢字 🙂".encode()),
        (b"\x1b[2J", rb"\x1b[2J"),
        (b"a\rb\x08\x7f\x00", rb"a\rb\x08\x7f\x00"),
        (b"\x9b31m", rb"\x9b31m"),
        ("\x9b31m".encode(), rb"\x9b31m"),
        ("\u202e".encode(), rb"\u202e"),
        ("\u2028\ufeff\U000e0001".encode(), rb"\u2028\ufeff\U000e0001"),
    ],
)
def test_control_characters_are_shown(data: bytes, shown: bytes) -> None:
    assert visible(data) == shown


@given(st.binary())
def test_nothing_but_printable_characters_comes_out(data: bytes) -> None:
    assert all(character.isprintable() or character in "\n\t" for character in visible(data).decode())


@given(st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"])))
def test_printable_text_passes(text: str) -> None:
    assert visible(text.encode()) == text.encode()


def test_what_would_be_several_lines_is_one() -> None:
    assert one_line("a b") == "a b"
    assert one_line("a\nb") == r"'a\nb'"


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (1 << 30, "1.0 GiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes(number: int, shown: str) -> None:
    assert size_of(number) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-0.5, "0s"),
        (0.0083, "8ms"),
        (2.25, "2.25s"),
        (9.999, "10s"),
        (59.9, "59s"),
        (60, "1m"),
        (725, "12m 5s"),
        (3605, "1h"),
        (3 * 86400 + 4 * 3600 + 59, "3d 4h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration_of(seconds) == shown
