"""Numbers for people. Where the kernel or the server does not tell one it is a dash."""

from __future__ import annotations

__all__ = ["UNKNOWN", "duration_of", "size_of", "time_of"]

UNKNOWN = "-"

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def size_of(number: int) -> str:
    """A number of bytes."""
    size = float(number)
    if size < 1024:
        return f"{number} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def duration_of(seconds: float) -> str:
    """How long, by its two largest units: `3d 4h`, `12m 5s`, `2.25s`, `8ms`."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 10:
        return f"{max(seconds, 0.0):.2f}".rstrip("0").rstrip(".") + "s"
    left = int(seconds)
    parts = []
    for unit, length in _UNITS:
        number, left = divmod(left, length)
        # Behind the largest one stands the next smaller, or nothing.
        if number:
            parts.append(f"{number}{unit}")
        elif parts:
            break
        if len(parts) == 2:
            break
    return " ".join(parts)


def time_of(seconds: float) -> str:
    """When, by this machine's clock."""
    import time  # noqa: PLC0415

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
