"""Homes as archives: exported, and imported on this host or another one.

Who does what:

    the host (this process, root)                    the child (the tenant's uid, a leaf of its own)
    holds the tenant: nothing starts                 waits for its program and its work
    freezes what runs, or sees that nothing does
    export: writes what comes beside the target      reads the home, packs, sends; the manifest last
    import: makes an empty home, gives it away       reads the archive, vets, writes into the empty home,
                                                     compares with the manifest
    renames in one step; lets go                     empties what is not needed any more

Root opens no path in a home and reads no byte of an archive for its meaning. What keeps a hostile archive, or a tenant
that changes its files meanwhile, from doing harm is that the child can do no more than the tenant could anyway; that
the child is picky about archives is the second line.
"""

from __future__ import annotations

from .children import LeftOut
from .errors import ArchiveError
from .exporting import ARCHIVE_TIMEOUT, Exported, While, export_home, export_stream
from .holding import end_hold, held
from .importing import Imported, import_home, import_stream
from .swapping import sweep_fresh_homes

__all__ = [
    "ARCHIVE_TIMEOUT",
    "ArchiveError",
    "Exported",
    "Imported",
    "LeftOut",
    "While",
    "end_hold",
    "export_home",
    "export_stream",
    "held",
    "import_home",
    "import_stream",
    "sweep_fresh_homes",
]
