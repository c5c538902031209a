"""A server as its callers have it."""

from __future__ import annotations

from .answers import Health
from .sandboxes import SandboxCalls
from .users import UserCalls

__all__ = ["Client"]


class Client(SandboxCalls, UserCalls):
    """A server that runs, on this host or another, as its API has it:

        async with Client() as client:
            print(await client.start(SandboxSpec(user_id="u", service_id="api", command=["python3", "main.py"])))

    Calls may be made from many tasks at once, of one event loop. What the server refuses is raised as the error that
    the library itself has for it; besides, any call may raise a `ClientError`: there is no server, it may not be asked,
    it does not answer, its answer is not understood. A call that is cancelled hangs up, which ends what lasts for its
    caller only: a run, an execution, a transfer.

    Args:
        address: a Unix socket's path, or `http(s)://host:port`; by default the socket that this host's settings name.
        token: the bearer token, by TCP.
        timeout: seconds for a connection to come about, for each piece that is sent, and for answers to what does not
            last by nature. Starts, stops and transfers last for as long as they last.

    Raises:
        ConfigError: the address, token or settings cannot be right.
        MissingExtraError: httpx is not installed.
    """

    async def health(self) -> Health:
        """Whether the server answers."""
        return await self._ask(Health.of, "GET", "/healthz")

    async def ready(self) -> Health:
        """Whether the server can do what it is for.

        Raises:
            RegistryError: the registry cannot be read.
            ServerStoppingError: it stops.
        """
        return await self._ask(Health.of, "GET", "/readyz")
