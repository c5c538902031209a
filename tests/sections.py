"""What a section of a document in `docs/` tells readers to type."""

from __future__ import annotations

import re

from tests.supervising import ROOT


def section(document: str, heading: str) -> str:
    """The text below a heading, to the next heading."""
    text = (ROOT / "docs" / document).read_text()
    (found,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(found)


def commands(document: str, heading: str) -> list[str]:
    """The blocks of shell commands in it."""
    return re.findall(r"^```sh\n(.*?)^```", section(document, heading), re.DOTALL | re.MULTILINE)
