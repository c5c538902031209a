"""The one error of this package."""

from __future__ import annotations

from ..errors import FilesError

__all__ = ["ArchiveError"]


class ArchiveError(FilesError):
    """A home could not be exported, or an archive was refused; the home is what it was."""

    code = "archive"
