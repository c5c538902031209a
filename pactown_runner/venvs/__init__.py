"""Python environments of sandboxes with `requirements`, made by their tenants; `venv_layout` says where they are.

A job with the tenant's uid, in a leaf of the tenant's slice and within the settings' default limits, does all of it:

    takes the lock of the tenant's cache: of two services that need the same environment one makes it, the other waits
    looks whether it is complete, and its interpreter runs; if so, that is all
    else puts what is there aside, clears away what others left half-made, and makes it with `uv`, or `venv` and `pip`
    writes all of it to the disk, and only then makes the folder that says that it is complete
    links the service to it, and removes what no service is linked to, but for the last few

So one that is half-made, after a `kill -9` or on a full disk, never counts as complete, and the next that needs it
begins anew. Environments are made where they stay: the programs in them hold their own path.

Packages are downloaded anew for each environment. A cache of them would grow without end; whoever wants one names a
caching index in `venv_index`.
"""

from __future__ import annotations

from .ensuring import ensure_venv

__all__ = ["ensure_venv"]
