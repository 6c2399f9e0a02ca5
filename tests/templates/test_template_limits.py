"""Chat templates that come with a model and never end: one sentence, soon."""

from __future__ import annotations

import signal
import time
from functools import partial

import pytest

from preference.templates import limits, resolve
from preference.templates.conversation import ConversationError
from tiny import tiny_tokenizer

HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "overflow": "{{ 1.0 * 10 ** 400 }}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "zero": "{{ 1 // 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "memory": "{{ ('x' * 10 ** 10) | length }}",
    "power": "{{ 9 ** 9 ** 9 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_an_end_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "limited_work", partial(limits.limited_work, 1.0))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(ConversationError, match="template_name instead of auto") as raised:
        resolve.resolve_template("auto", tokenizer)
    assert "\n" not in str(raised.value) and time.monotonic() - began < 30
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
