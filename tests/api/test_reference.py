"""The four routes of the reference: each request as it stands there, by curl, and its answer, equal in structure."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.api.conftest import Api

pytestmark = [pytest.mark.host]

_PAIR = re.compile(r"```bash\n(GET|DELETE) (\S+)\n```\n\n\*\*Response:\*\*\n```json\n(.*?)\n```", re.DOTALL)


def shape(value: Any) -> Any:
    """The structure of a JSON value: names and types."""
    if isinstance(value, dict):
        return {name: shape(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return type(value)


async def test_each_request_is_answered_as_the_reference_says(api: Api, reference: str) -> None:
    await api.supervisor.users.get_or_create("user123")
    pairs = _PAIR.findall(reference)
    assert [path for _, path, _ in pairs] == [
        "/runner/isolation/users",
        "/runner/isolation/user/user123",
        "/runner/isolation/user/user123/stats",
        "/runner/isolation/user/user123?delete_home=true",
    ]
    # All that there is of the API in that document.
    section = reference.partition("## REST API Integration")[2].partition("\n## ")[0]
    assert section.count("\n### ") == len(pairs)
    for method, path, answer in pairs:
        told = await api.curl("-X", method, path)
        assert told.status == 200, told.body
        assert told.headers["content-type"] == "application/json"
        assert shape(told.json) == shape(json.loads(answer)), path
        if method == "DELETE":
            assert told.json == {"success": True, "user_id": "user123"}
    assert await api.supervisor.users.get("user123") is None


async def test_the_get_makes_a_user_for_who_may_change_things(api: Api) -> None:
    made = await api.curl("/runner/isolation/user/user123")
    user = await api.supervisor.users.get("user123")
    assert user is not None
    assert made.json == user.to_dict()
    assert (await api.curl("/runner/isolation/users")).json == {"users": [user.to_dict()], "count": 1}


async def test_without_a_user_there_are_no_stats_and_nothing_to_delete(api: Api) -> None:
    for words in (["/runner/isolation/user/nobody/stats"], ["-X", "DELETE", "/runner/isolation/user/nobody"]):
        told = await api.curl(*words)
        assert told.status == 404
        assert told.headers["content-type"] == "application/problem+json"
        assert told.json["code"] == "not-found"
    assert await api.supervisor.users.list() == []
