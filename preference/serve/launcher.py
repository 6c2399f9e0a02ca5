"""serve.sh beside an exported model: the command of each server that knows the model's template and stop tokens."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_HEAD = """\
#!/bin/sh
# Serves this model for this machine alone, with the chat template it was trained with and the tokens it stops at:
#   sh serve.sh {servers}     (default: {first}; more arguments go to the server, PORT=8000)
# Ask it: curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
#   -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello."}}]}}'
cd "$(dirname "$0")" || exit 1
server="${{1:-{first}}}"
[ $# -eq 0 ] || shift
port="${{PORT:-8000}}"
case "$server" in
"""
_TAIL = """\
*) echo "serve.sh: $server is none of: {servers}" >&2; exit 2 ;;
esac
"""


def served_name(name: str) -> str:
    """A name that every server takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "tuned"


def serve_script(name: str, gguf: str | None, stops: Sequence[int]) -> str:
    """The script, for sh. `gguf` is the file beside it; `stops` are the ids that end an answer.

    llama-server reads template and stop tokens from the GGUF file, vLLM and SGLang from the tokenizer and from
    generation_config.json, Ollama from the Modelfile.
    """
    alias = served_name(name)
    cases = {}
    if gguf:
        cases["llama"] = (
            f'exec "${{LLAMA_SERVER:-llama-server}}" -m {shlex.quote(gguf)} --jinja --alias {alias} '
            '--host 127.0.0.1 --port "$port" "$@"'
        )
    ids = ",".join(map(str, stops))
    override = shlex.quote(f'{{"stop_token_ids": [{ids}]}}')
    cases["vllm"] = (
        f"exec vllm serve . --served-model-name {alias} --chat-template chat_template.jinja "
        f'--override-generation-config {override} --host 127.0.0.1 --port "$port" "$@"'
    )
    cases["sglang"] = (
        f'exec "${{PYTHON:-python3}}" -m sglang.launch_server --model-path . --served-model-name {alias} '
        '--chat-template chat_template.jinja --host 127.0.0.1 --port "$port" "$@"'
    )
    if gguf:
        cases["ollama"] = f'ollama create {alias} -f Modelfile && exec ollama run {alias} "$@"'
    servers = "|".join(cases)
    lines = "".join(f"{server}) {command} ;;\n" for server, command in cases.items())
    return _HEAD.format(servers=servers, first=next(iter(cases)), name=alias) + lines + _TAIL.format(servers=servers)
