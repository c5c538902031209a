"""Ids of any kind on their way through URLs: each is the same at the other end, and no two ever meet."""

from __future__ import annotations

import pytest

from pactown_runner import Client
from pactown_runner.errors import NotFoundError, SpecError
from tests.api.conftest import Api
from tests.supervising import spec

pytestmark = [pytest.mark.host]

IDS = (
    *(".", "..", "%2e%2e", "/", "//", "a/..", "a/stats", "a/b", "a%2Fb", "a?b#c", "a+b", "a b", "%", "\\", "a\nb\r\n"),
    *("\u00e9", "e\u0301", "\U0001f600", "http://x/y"),
)


@pytest.mark.deadline(300)  # each is an account, and others make accounts meanwhile
@pytest.mark.parametrize("client", ["socket"], indirect=True)
async def test_users_are_who_they_are(api: Api, client: Client) -> None:
    for user_id in IDS:
        with pytest.raises(NotFoundError):
            await client.get_user(user_id)
    made = {user_id: await client.create_user(user_id) for user_id in IDS}
    assert {user.saas_user_id: user for user in await client.list_users()} == made
    assert len({user.linux_uid for user in made.values()}) == len(IDS)
    for user_id, user in made.items():
        assert await client.get_user(user_id) == user
        assert await api.supervisor.users.get(user_id) == user
        assert (await client.user_tier(user_id)).user_id == user_id
        assert await client.list_sandboxes(user_id) == []
    for user_id in IDS[:4]:
        await client.delete_user(user_id)
    assert {user.saas_user_id for user in await client.list_users()} == set(IDS[4:])


@pytest.mark.parametrize("user_id", [".", "..", "a/stats", "%2e%2e", "a?b#c"])
async def test_services_are_their_users(api: Api, client: Client, user_id: str) -> None:
    made = await client.start(spec("echo said; sleep 600", user=user_id, service="a..-_"))
    assert api.supervisor.get(user_id, "a..-_").pid == made.pid
    assert (await client.get_sandbox(user_id, "a..-_")).pid == made.pid
    assert [view.user_id for view in await client.list_sandboxes(user_id)] == [user_id]
    await client.put_file(user_id, "a..-_", "d/f", b"x")
    assert await client.get_file(user_id, "a..-_", "d/f") == b"x"
    assert (await client.stop(user_id, "a..-_", grace=0)).user_id == user_id
    assert [record.line async for record in client.logs(user_id, "a..-_")] == ["said"]


@pytest.mark.parametrize("user_id", ["", "a\0b", "\udcff", "x" * 1025])
async def test_what_is_no_id_is_refused(api: Api, client: Client, user_id: str) -> None:
    with pytest.raises(SpecError):
        await client.get_user(user_id)
    with pytest.raises(SpecError):
        await client.get_sandbox(user_id, "api")
    with pytest.raises(SpecError):
        await client.list_sandboxes(user_id)
    with pytest.raises(SpecError):
        client.events(user_id=user_id)
    with pytest.raises(SpecError):
        await client.import_user("a", "/dev/null", made_for=user_id)
    for service_id in ("", ".", "..", "a/b", "\u00e9"):
        with pytest.raises(SpecError):
            await client.get_sandbox("a", service_id)
