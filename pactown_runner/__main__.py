"""`python -m pactown_runner`: the same as `pactown-runner`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
