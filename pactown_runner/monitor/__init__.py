"""What the kernel says about sandboxes while they run, as events: `oom`, `pressure`, `throttled`.

What can be heard of is in one epoll(7), which the event loop watches as one descriptor: of each sandbox its
`memory.events`, where memory is controlled, and of each tenant two pressure triggers. How often a quota throttles can
only be read, which is done for sandboxes that have one. There is one timer for all, and only when something is due.

What would take long is put off, and so often saved: a tenant's triggers are opened a moment after its first sandbox, in
a thread, and closed likewise, many at once. A sandbox that lives for less costs microseconds.
"""

from __future__ import annotations

from .monitor import Monitor

__all__ = ["Monitor"]
