"""Conversation templates: text in, prompt and response text out, as the model's own chat template writes them.

    from conversation import get_conv_template, TEMPLATES
    conv = get_conv_template("qwen2_5")
    conv.get_prompt(question, history=[[user, assistant], ...], system=None)   # ends where the assistant begins
    conv.get_response(reply)                                                   # what is learned, stop text included

    python conversation.py --list                                              # the table of families
    python conversation.py --template qwen3 --model DIR [--data FILE --row N] [--ids]

This is the face of preference/templates/, where the families and the class lie. Facts behind the families, and what
becomes of reasoning: docs/templates.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from preference.templates.conversation import Conversation, ConversationError
from preference.templates.families import ALIASES, FAMILIES, TEMPLATES, fold_system_text, get_conv_template

__all__ = [
    "ALIASES",
    "FAMILIES",
    "TEMPLATES",
    "Conversation",
    "ConversationError",
    "fold_system_text",
    "get_conv_template",
]


def list_families() -> str:
    """The table that --list prints: a line for each family, its aliases, system handling and stop text."""
    rows = [("template", "system text", "default", "stop text", "models")]
    places = {"first": "in the first question", "last": "in the last question", "refused": "refused"}
    for conv in FAMILIES.values():
        default = "no" if conv.default_system is None else "yes" if conv.default_system else "empty"
        system = places.get(conv.system_place, "own turn" if conv.system[0] else "plain text at the start")
        names = ", ".join([conv.name, *(alias for alias, name in ALIASES.items() if name == conv.name)])
        rows.append((conv.name, system, default, conv.stop_str, f"{conv.models} [{names}]"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = (zip(row, [*widths, 0], strict=True) for row in rows)
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in line) for line in lines)


def main(arguments: Sequence[str]) -> int:
    if "--list" in arguments:
        print(list_families())
        return 0
    from preference.serve.preview import main as preview  # needs a tokenizer, so it is slow to import

    return preview(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
