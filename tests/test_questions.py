"""The messages that docs/questions.md quotes are those of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOLE = "\0"  # where a message has a value


def _messages() -> set[str]:
    """Every text in the package, f-strings with a `HOLE` for each value."""
    found = set()
    for path in (ROOT / "progtuning_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else HOLE for p in node.values)
                found.add(re.sub(f"{HOLE}+", HOLE, "".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_every_quoted_message_begins_one_of_the_code():
    page = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^- `(.+)`$", page.split("\n## Error messages\n")[1], flags=re.M)
    messages = _messages()

    def is_there(quote: str) -> bool:
        whole = quote.replace("...", HOLE)
        # "name: what is wrong" is put together where the message is made
        begins = (whole, whole.removeprefix(f"{HOLE}: "))
        return any(message.startswith(begins) for message in messages)

    assert quoted and not [quote for quote in quoted if not is_there(quote)]
