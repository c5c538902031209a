"""`python -m benchmarks`: run them all."""

from __future__ import annotations

import sys

from . import spawn

if __name__ == "__main__":
    sys.exit(spawn.main())
