#!/usr/bin/env python3
"""Print the command for a config of TRL, LLaMA-Factory, axolotl or ms-swift, and name what has no counterpart.

    python migrate.py dpo.yaml
    python migrate.py dpo.yaml > run.sh     # the command; what is left goes to standard error

Nothing is run and nothing is read but the file. Exit status 1: the file cannot be translated.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from preference.launch.tool import run_tool
from preference.screen import shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML or JSON file")
    parser.add_argument("--tool", choices=["TRL", "LLaMA-Factory", "axolotl", "ms-swift"], help="whose, if not told")
    args = parser.parse_args()
    run_tool(lambda: translate(args.config, args.tool), "migrate.py")


def translate(path: str, tool: str | None) -> None:
    from preference.arguments import parse_arguments
    from preference.arguments.migration import migrate, read_foreign
    from preference.flags.declaration import ArgumentError

    found = migrate(read_foreign(path), tool)
    print(f"# a config of {found.tool}", file=sys.stderr)
    for key, why in found.left:
        print(shown(f"# left out: {key}: {why}"), file=sys.stderr)
    words = [f"--{name} {shlex.quote(text)}" for name, text in found.flags.items()]
    print(" \\\n    ".join(["python orpo_train.py", *words]))
    try:
        parse_arguments([word for name, text in found.flags.items() for word in (f"--{name}={text}",)])
    except ArgumentError as error:
        print(shown(f"# the command needs a change: {error}"), file=sys.stderr)


if __name__ == "__main__":
    main()
