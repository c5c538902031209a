"""Ids are matched on the raw path: an encoded slash is a part of one, and no two are ever taken for one."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pactown_runner.api.paths import MalformedPathError, canonical, decoded
from tests.api.conftest import Api

SEGMENT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/users/a%2Fstats", "/users/a%2Fstats"),
        (b"/users/a%2fstats", "/users/a%2Fstats"),
        (b"/users/a/stats", "/users/a/stats"),
        (b"/%75sers/%61", "/users/a"),
        (b"/users/a%252Fstats", "/users/a%252Fstats"),
        (b"/users/auth0|1", "/users/auth0%7C1"),
        (b"/users/a+b%20c", "/users/a%2Bb%20c"),
        ("/users/\u00e9".encode(), "/users/%C3%A9"),
        (b"/a//b/", "/a//b/"),
        (b"/a/../b/.", "/a/../b/."),
    ],
)
def test_each_segment_has_one_form(raw: bytes, path: str) -> None:
    assert canonical(raw) == path


@pytest.mark.parametrize(
    "raw", [b"", b"*", b"a/b", b"http://host/a", b"/%", b"/%4", b"/%zz", b"/%ff", b"/\xff", b"/%c3/%a9"]
)
def test_what_cannot_be_decoded_is_refused(raw: bytes) -> None:
    with pytest.raises(MalformedPathError):
        canonical(raw)


@given(st.lists(SEGMENT, min_size=1), st.sampled_from(["", "/", "-_.~", "!*'()|@:"]))
def test_however_they_are_encoded_segments_come_out_as_they_were(segments: list[str], safe: str) -> None:
    raw = "".join("/" + quote(segment, safe=safe.replace("/", "")) for segment in segments).encode()
    assert [decoded(segment) for segment in canonical(raw).split("/")[1:]] == segments


@given(SEGMENT, SEGMENT)
def test_two_ids_never_meet(one: str, other: str) -> None:
    paths = [canonical(b"/user/" + quote(user, safe="").encode()) for user in (one, other)]
    assert (paths[0] == paths[1]) is (one == other)


IDS = [
    "a",
    "a/stats",
    "a/tier",
    "a%2Fstats",
    "a%252Fstats",
    "../../etc",
    "..",
    "a?b",
    "a#b",
    "a b",
    "\u00e9",
    "e\u0301",
    "\ufffd",
]


@pytest.mark.host
async def test_ids_that_look_like_routes_are_users_of_their_own(api: Api) -> None:
    for user_id in IDS:
        made = await api.curl("-X", "PUT", f"/runner/isolation/user/{quote(user_id, safe='')}")
        assert made.status == 200, made.body
        assert made.json["saas_user_id"] == user_id
    users = await api.supervisor.users.list()
    assert [user.saas_user_id for user in users] == IDS
    assert len({user.linux_uid for user in users}) == len(IDS)
    stats = await api.curl("/runner/isolation/user/a%2Fstats/stats")
    assert stats.json["user"]["saas_user_id"] == "a/stats"
    stats = await api.curl("/runner/isolation/user/a/stats")
    assert stats.json["user"]["saas_user_id"] == "a"


@pytest.mark.host
@pytest.mark.parametrize(
    "path",
    [
        "/runner/isolation/user/%ff",
        "/runner/isolation/user/a%ed%a0%80",
        "/%",
        "/runner/sandboxes?user_id=%ff",
        "/healthz?%",
    ],
)
async def test_undecodable_bytes_are_told(api: Api, path: str) -> None:
    told = await api.curl("-X", "PUT", path)
    assert (told.status, told.json["code"]) == (400, "bad-path")
    assert await api.supervisor.users.list() == []


@pytest.mark.host
async def test_what_leads_nowhere_is_a_problem(api: Api) -> None:
    for path in ("/", "/runner", "/runner/isolation/user/", "/runner/isolation/user/a/", "//healthz", "/healthz/"):
        told = await api.curl(path)
        assert (told.status, told.json["code"]) == (404, "not-found"), path
    told = await api.curl("-X", "POST", "/runner/isolation/user/a")
    assert (told.status, told.json["code"]) == (405, "bad-method")
    assert told.headers["allow"] == "DELETE, GET, PUT"
    told = await api.curl("-X", "PUT", f"/runner/isolation/user/{'x' * 1025}")
    assert (told.status, told.json["code"]) == (422, "bad-spec")
    told = await api.curl("-X", "PUT", "/runner/isolation/user/a%00b")
    assert (told.status, told.json["code"]) == (422, "bad-spec")
    assert await api.supervisor.users.list() == []
