"""Files into and out of a sandbox's directory, moved by jobs that run as the tenant.

Nothing here opens a path in a tenant's home: not to look, not to write. On the inside works a `tar` with the tenant's
uid, so that links and names that the tenant plants lead to no more than the tenant reaches anyway; on the outside this
process packs the operator's files (`packing`), or unpacks, with all suspicion, what the tenant's `tar` says
(`unpacking`). `put` and `get` are one transfer each, `files` is the face.
"""

from __future__ import annotations

from .files import SandboxFiles
from .transfer import OnProgress, Transfer

__all__ = ["OnProgress", "SandboxFiles", "Transfer"]
