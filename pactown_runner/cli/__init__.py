"""The command `pactown-runner`.

It is a client of the library and holds no logic of its own that others would need. What a command needs is imported
when it runs, so that `--help` and completion need not wait for it. Each command is a module here; `app` lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_USAGE_ERROR = 2
_RUN_FAILED = 125


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code.

    Args:
        argv: the words behind the command's name; those of the process if None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        import typer  # noqa: F401, PLC0415 - it is an extra, and its absence is an answer
    except ModuleNotFoundError as error:
        print(f"error: the command line needs {error.name}, which is not installed", file=sys.stderr)
        print("try: pip install 'pactown-runner[cli]'", file=sys.stderr)
        return _USAGE_ERROR

    from .messages import NO_READER, drop_output  # noqa: PLC0415 - it needs typer

    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()
        return NO_READER
    except KeyboardInterrupt:
        return 130
    return status


def _run(words: list[str]) -> int:
    from .app import make_app  # noqa: PLC0415
    from .messages import Ended  # noqa: PLC0415

    try:
        make_app()(args=words, prog_name="pactown-runner")
    except Ended as end:
        return end.status
    except SystemExit as end:
        # A program that is run may well end with 2 itself: its caller has to be able to tell.
        is_misuse = end.code == _USAGE_ERROR and words[:1] in (["run"], ["exec"])
        return _RUN_FAILED if is_misuse else end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
