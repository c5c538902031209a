"""`python -m benchmarks [NAME] [options]`: one (options alone: `spawn`), or all with their defaults."""

from __future__ import annotations

import signal
import sys

from . import api, idle, logs, logs_flood, scrape, spawn, venvs

BENCHMARKS = {
    "spawn": spawn.main,
    "logs": logs.main,
    "logs_flood": logs_flood.main,
    "idle": idle.main,
    "scrape": scrape.main,
    "venvs": venvs.main,
    "api": api.main,
}


def main(words: list[str]) -> int:
    """Run what is named first, with the words behind it, or everything."""
    # As control-C does: what was made is removed first.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    if words and words[0] in BENCHMARKS:
        return BENCHMARKS[words[0]](words[1:])
    if words and words[0].startswith("-"):
        return spawn.main(words)
    if words:
        print(f"usage: python -m benchmarks [{'|'.join(BENCHMARKS)}] [options]", file=sys.stderr)
        return 2
    status = 0
    for name, run in BENCHMARKS.items():
        print(f"\n== {name}")
        status |= run([])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
