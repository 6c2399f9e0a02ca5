"""The table of formats in data/README.md. `python tests/data/test_format_table.py` writes it anew."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "data" / "README.md"
BEGIN = "<!-- formats: written by tests/data/test_format_table.py -->\n"
END = "<!-- end of formats -->\n"


def table() -> str:
    from preference.data.formats import FORMATS

    lines = ["| Format | What it reads | Taken |", "|---|---|---|"]
    for name, format in sorted(FORMATS.items()):
        how = "by itself"
        if format.only_when_named or not format.detected:
            how = "when named"
        elif format.guess:
            how = "by itself, with a warning; not in data_check=strict"
        lines.append(f"| `{name}` | {format.what.replace('|', 'or')} | {how} |")
    return "\n".join(lines) + "\n"


def test_readme_lists_every_format():
    text = README.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == table()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
