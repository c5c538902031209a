"""The machinery that runs documents: it finds what is wrong with one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.documents import Session, blocks

GOOD = """\
```sh
touch made; count=3
```

```console
# ls; echo "count $count"
made
count …
# printf '%s\\n' one two \\
  three
one
...
# [ "$count" = 3 ] || echo "uid 60001"
```

```python
def double(number: int) -> int:
    return 2 * number

print(double(21))
```
```text
42
```

```json
{"a": 1}
```
"""


@pytest.fixture
def session(tmp_path: Path) -> Session:
    # Nothing here is to make a supervisor; one that is made all the same fails.
    environ = {**os.environ, "PACTOWN_CGROUP_SLICE": "test.slice", "PACTOWN_USERS_BASE": "none"}
    return Session(tmp_path, environ, ["true"], homes=tmp_path, run=tmp_path)


def follow(session: Session, tmp_path: Path, text: str) -> None:
    document = tmp_path / "document.md"
    document.write_text(text)
    session.follow(blocks(document))


def test_a_good_document_passes(session: Session, tmp_path: Path) -> None:
    follow(session, tmp_path, GOOD)


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("made\ncount …", "Made\ncount …", "document.md:6: ls"),
        ("count …", "count 4", "count 4"),
        ("count …\n", "", "document.md:6"),
        ("one\n...", "two\n...", "printf"),
        ("touch made", "false", "document.md:2: failed"),
        ("touch made", "false | true", "failed"),
        ("ls; echo", "false; echo", "document.md:6: failed"),
        ("2 * number", "3 * number", "should print\n42\n\nand printed\n63"),
        ("print(double(21))", "raise SystemExit(double(21))", "failed"),
    ],
)
def test_what_is_wrong_is_told(session: Session, tmp_path: Path, right: str, wrong: str, told: str) -> None:
    assert right in GOOD
    with pytest.raises(AssertionError) as failure:
        follow(session, tmp_path, GOOD.replace(right, wrong))
    assert told in str(failure.value)


def test_what_does_not_end_is_told(session: Session, tmp_path: Path) -> None:
    document = tmp_path / "document.md"
    document.write_text("```sh\necho begun; sleep 1000\n```\n")
    with pytest.raises(AssertionError, match=r"document.md:2: not done after 0.5 s:(?s:.*)\nbegun\n"):
        session.follow(blocks(document), 0.5)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- not run: it is hard -->\n```sh\ntrue\n```\n",
        "<!-- slow -->\n```sh\ntrue\n```\n",
        "```bash\ntrue\n```\n",
        "```\ntrue\n```\n",
        "```sh\ntrue\n",
    ],
)
def test_what_nobody_knows_is_refused(tmp_path: Path, text: str) -> None:
    document = tmp_path / "document.md"
    document.write_text(text)
    with pytest.raises(AssertionError):
        blocks(document)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("import os\nprint(os.getpid())", False),
        ("await something()", True),
        ("async with a as b: pass", True),
        ("print(sandbox.state)", True),
        ("def double(number): return 2 * number\nprint(double(21))", False),
        ("import asyncio\nasync def main(): await asyncio.sleep(0)\nasyncio.run(main())", False),
    ],
)
def test_what_goes_on_with_what_stands_above_is_known(tmp_path: Path, text: str, part: bool) -> None:
    document = tmp_path / "document.md"
    document.write_text(f"```python\n{text}\n```\n")
    (block,) = blocks(document)
    assert block.is_part is part
