"""Ask a server for what its OpenAPI document allows, and for what it does not: `python -m tests.api.fuzz URL ...`.

A program of its own, so that the server has a core to itself. Prints one JSON object: how many requests there were,
what each route answered, and each failure of one of Schemathesis's checks.

What is asked is bent just before it is sent. None of this makes something right of what is wrong, or the other way
round:

- half of the ids, services, commands and archives are some that are there, or last, or are whole: else nearly all would
  be about nothing;
- seconds that a request may last, or a service has before it is killed, are few: a caller may have it wait for a month;
- requirements are left out: a package index would be asked for made-up names.

Streams have a bound of the server's. The check that what seems right is accepted is left out, see `_config`, and with
three routes that take long there are fewer requests. Nothing else is left out: no route, no method, no kind of check.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import requests
import schemathesis
from schemathesis import Case
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from schemathesis.engine.recorder import Interaction, ScenarioRecorder
from schemathesis.hooks import HookContext
from schemathesis.transport.serialization import Binary, serialize_binary

USERS = ("auth0|123456", "a/b", "other")


def mover(seed: int) -> str:
    """A client's own user, of whom nothing runs, so that an archive can be imported."""
    return f"mover-{seed}"


SERVICES = ("api", "web")
COMMANDS: tuple[Any, ...] = (["sleep", "600"], "echo hello; sleep 600", "exit 3", ["cat"])

MOST_SECONDS = 31 * 86_400.0
"""Beyond it a number is wrong, and is left as it is."""
_BRIEF = {"grace": 0.1, "timeout": 0.2, "stop_grace": 0.1, "within": 1.0}
_EXPENSIVE = {"users-delete": 0.1, "users-export": 0.1, "users-import": 0.2}
"""Routes that take long, and are asked so much less."""


def _shorten(values: Any) -> None:
    """Shorten all that may last, in place."""
    if isinstance(values, list):
        for value in values:
            _shorten(value)
    if not isinstance(values, dict):
        return
    for name, value in values.items():
        most = _BRIEF.get(name)
        if most is not None and isinstance(value, int | float) and not isinstance(value, bool):
            if most < value <= MOST_SECONDS:
                values[name] = most
        else:
            _shorten(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


_RIGHT = {
    "user_id": re.compile(".{1,1024}", re.DOTALL),
    "service_id": re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,62}"),
    "command": re.compile(".+", re.DOTALL),
}


class _Bend:
    """See the module: what becomes of each request just before it is sent, whoever made it up."""

    def __init__(self, seed: int, archive: bytes) -> None:
        self._random = random.Random(seed)
        self._mover = mover(seed)
        self._archive = archive

    def __call__(self, case: Case[Any]) -> None:
        importing = case.operation.path.endswith("/import")
        users = (self._mover,) if importing else USERS
        for values in (case.path_parameters, case.query, case.body):
            if isinstance(values, dict):
                # What is wrong stays wrong.
                _shorten(values)
                for name, known in (("user_id", users), ("service_id", SERVICES), ("command", COMMANDS)):
                    given = values.get(name)
                    if isinstance(given, str) and _RIGHT[name].fullmatch(given):
                        values[name] = self._one_of(known, given)
        if isinstance(case.body, dict):
            self._bend_body(case.body, case.operation.path)

    @staticmethod
    def _bend_body(body: dict[str, Any], path: str) -> None:
        if _is_texts(body.get("requirements")):
            body["requirements"] = []
        if path.endswith("/exec"):
            body.setdefault("timeout", _BRIEF["timeout"])
        elif body.get("kind") == "run" and body.get("timeout") is None:
            body["timeout"] = _BRIEF["timeout"]

    def archive(self, made_up: Binary) -> bytes:
        """What is sent to be imported."""
        found: bytes = self._one_of((self._archive,), made_up.data)
        return found

    def _one_of(self, known: Sequence[Any], given: Any) -> Any:
        return self._random.choice(known) if self._random.random() < 0.5 else given


def _archive(options: argparse.Namespace) -> bytes:
    """A home as it is exported."""
    user = f"{options.url}/runner/isolation/user/{mover(options.seed)}"
    headers = {"Authorization": f"Bearer {options.token}"}
    requests.put(user, headers=headers, timeout=30).raise_for_status()
    answer = requests.post(f"{user}/export", headers=headers, timeout=30)
    answer.raise_for_status()
    return answer.content


def _config(options: argparse.Namespace) -> SchemathesisConfig:
    fewer = {name: max(1, int(options.examples * share)) for name, share in _EXPENSIVE.items()}
    return SchemathesisConfig.from_dict(
        {
            "seed": options.seed,
            "base-url": options.url,
            "headers": {"Authorization": f"Bearer {options.token}"},
            "request-timeout": 30,
            "continue-on-failure": True,
            "generation": {"database": "none", "no-shrink": True, "max-examples": options.examples},
            "checks": {
                # The document cannot say all that makes a request wrong: that a user has no such service, a NUL.
                "positive_data_acceptance": {"enabled": False},
            },
            "operations": [
                {"include-operation-id": name, "generation": {"max-examples": count}} for name, count in fewer.items()
            ],
        }
    )


class _Report:
    """What was answered."""

    def __init__(self) -> None:
        self._answers: dict[str, Counter[str]] = defaultdict(Counter)
        self._examples: dict[str, str] = {}
        self._failures: list[str] = []
        self._times: list[tuple[float, str]] = []

    def hear(self, event: events.EngineEvent) -> None:
        """Take note of what the engine tells."""
        if isinstance(event, events.ScenarioFinished):
            self._count(event.recorder)
        elif isinstance(event, events.NonFatalError):
            self._failures.append(f"{event.label}: {event.value!r}"[:1000])
        elif isinstance(event, events.FatalError):
            self._failures.append(f"fatal: {event.exception!r}")

    def _count(self, recorder: ScenarioRecorder) -> None:
        for case_id, seen in recorder.interactions.items():
            route = recorder.cases[case_id].value.operation.label
            status = "none" if seen.response is None else str(seen.response.status_code)
            self._answers[route][status] += 1
            if seen.response is not None:
                self._times.append((seen.response.elapsed, f"{route} {status} {seen.request.uri}"))
            self._examples.setdefault(f"{route} {status}", _end(seen))
        for case_id, checks in recorder.checks.items():
            for check in checks:
                if check.failure_info is not None:
                    failure = check.failure_info.failure
                    answer = _end(recorder.interactions.get(case_id))
                    parts = (
                        f"{check.name}: {failure.title}: {failure.message}",
                        check.failure_info.code_sample,
                        answer,
                    )
                    self._failures.append("\n".join(part[:800] for part in parts))

    def to_dict(self) -> dict[str, Any]:
        """As it is printed."""
        return {
            "requests": sum(answer.total() for answer in self._answers.values()),
            "answers": {route: dict(sorted(each.items())) for route, each in sorted(self._answers.items())},
            "examples": self._examples,
            "slowest": sorted(self._times, reverse=True)[:20],
            "failures": self._failures,
        }


def _end(seen: Interaction | None) -> str:
    """The end of an answer; its beginning is the same for all problems."""
    return (
        "" if seen is None or seen.response is None else (seen.response.content or b"")[-200:].decode(errors="replace")
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--token", required=True)
    parser.add_argument("--examples", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()
    schema = schemathesis.openapi.from_url(
        f"{options.url}/openapi.json", config=_config(options), headers={"Authorization": f"Bearer {options.token}"}
    )
    bend = _Bend(options.seed, _archive(options))

    @schemathesis.serializer("application/gzip")
    def archive(context: Any, made_up: Any) -> bytes:
        return bend.archive(made_up) if isinstance(made_up, Binary) else serialize_binary(made_up)

    @schemathesis.hook
    def before_call(context: HookContext, case: Case[Any], kwargs: dict[str, Any]) -> None:
        bend(case)

    report = _Report()
    for event in from_schema(schema).execute():
        report.hear(event)
    json.dump(report.to_dict(), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
