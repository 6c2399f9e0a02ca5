"""How chat templates mark their turns, read off the families that this project can write, for taking texts apart.

A `Notation` is the other direction of a `Conversation`: where its marks stand in a text, turns begin. Families that
mark turns alike (ChatML's many users) are one notation. Notations of plain words ("Human: ... Assistant:") are not
listed: `labelled_marks` makes them of the words that the text itself begins and ends with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from os.path import commonprefix

from preference.data.formats.messages import ROLES, TOOL_ROLES
from preference.templates.conversation import Conversation
from preference.templates.families import FAMILIES

# What stands for a role in templates alone
ROLE_WORDS = ROLES | dict.fromkeys(sorted(TOOL_ROLES), "tool")
ROLE_WORDS |= dict.fromkeys(("patient", "患者", "用户", "人类", "问"), "user")
ROLE_WORDS |= dict.fromkeys(("chatbot", "doctor", "医生", "助手", "答"), "assistant")

# Renderings that people's files hold and that no family of ours writes
_OTHERS = (
    Conversation("nemo", "NeMo Aligner", ("<extra_id_1>User\n", "\n"), "<extra_id_1>Assistant\n", "\n<extra_id_1>",
                 "\n", (), ("<extra_id_0>System\n", "\n")),
    Conversation("openchat", "OpenChat 3.5", ("GPT4 Correct User: ", "<|end_of_turn|>"), "GPT4 Correct Assistant:",
                 "<|end_of_turn|>", "<|end_of_turn|>", ()),
    Conversation("openassistant", "OpenAssistant", ("<|prompter|>", "<|endoftext|>"), "<|assistant|>", "<|endoftext|>",
                 "<|endoftext|>", (), ("<|system|>", "<|endoftext|>")),
    Conversation("granite", "Granite 3", ("<|start_of_role|>user<|end_of_role|>", "<|end_of_text|>\n"),
                 "<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>", "<|end_of_text|>\n", ()),
    Conversation("harmony", "gpt-oss", ("<|start|>user<|message|>", "<|end|>"), "<|start|>assistant", "<|return|>",
                 "<|end|>", (), ("<|start|>system<|message|>", "<|end|>")),
    Conversation("mistral_v7", "Mistral Small, Large 2411", ("[INST]", "[/INST]"), "", "</s>", "</s>", (),
                 ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), begin="<s>"),
)  # fmt: skip
_KNOWN = (*FAMILIES.values(), *_OTHERS)
_PLAIN = ("deepseek_v2", "vicuna")  # families whose marks are plain words, see labelled_marks


@dataclass(frozen=True)
class Notation:
    """Each alternative of `marks` has a group `role` (a word for a role), or a group that is named by its role."""

    name: str  # the user's mark
    marks: re.Pattern[str]
    preamble: bool = False  # text in front of the first mark is the system text

    def roles(self, text: str) -> Iterator[tuple[re.Match[str], str]]:
        """Each mark of the text and its role; an unknown role's word stands for itself."""
        for match in self.marks.finditer(text):
            kind = match.lastgroup or ""
            word = match.group("role").strip().lower() if kind == "role" else kind
            yield match, ROLE_WORDS.get(word, word)


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    """The texts without outer white space and without the empty one, none behind one that it begins with."""
    return tuple(sorted({text.strip() for text in texts} - {""}, key=lambda text: (-len(text), text)))


def _notation(conv: Conversation) -> Notation:
    user, reply, system = conv.user[0].strip(), conv.assistant.strip(), conv.system[0].strip().split("\n\n")[0]
    user = user.removeprefix("<s>").strip()
    kinds = {"user": re.escape(user), "assistant": re.escape(reply or conv.user[1].strip())}
    if reply and (shape := _shape(user, reply)):
        kinds = {"role": shape}
    if system and conv.system_place == "turn" and not any(re.fullmatch(pattern, system) for pattern in kinds.values()):
        kinds["system"] = re.escape(system)
    marks = re.compile(
        "|".join(f"(?P<{kind}>{pattern})" if kind != "role" else pattern for kind, pattern in kinds.items())
    )
    return Notation(user, marks, preamble=not system and conv.system_place in ("turn", "refused"))


def _shape(user: str, reply: str) -> str:
    """A pattern for the marks of all roles, out of the user's and the assistant's: they differ in a word for the role.

    Behind a whole token (`<|im_start|>`) any word is a role; inside of one only the words that are known.
    """
    before = commonprefix([user, reply])
    behind = commonprefix([user[: len(before) - 1 : -1], reply[: len(before) - 1 : -1]])[::-1]
    words = [text[len(before) : len(text) - len(behind)] for text in (user, reply)]
    if not before or any(word.lower() not in ROLE_WORDS for word in words):
        return ""
    known = "|".join(map(re.escape, _longest_first(ROLE_WORDS)))
    word = r"\w+" if before[-1] in ">" else rf"(?i:{known})"
    return re.escape(before) + rf"(?P<role>{word})" + re.escape(behind)


def _all_notations() -> tuple[Notation, ...]:
    alpaca = FAMILIES["alpaca"]
    instruction, response = re.escape(alpaca.user[0].strip()), re.escape(alpaca.assistant)
    given = Notation(
        alpaca.user[0].strip(),
        re.compile(rf"(?P<user>{instruction})|(?P<input>### Input:)|(?P<assistant>{response})"),
        preamble=True,
    )
    found: dict[str, Notation] = {given.marks.pattern: given}
    for conv in _KNOWN:
        if conv.name in _PLAIN or conv is alpaca:
            continue
        made = _notation(conv)
        same = found.get(made.marks.pattern)
        found[made.marks.pattern] = Notation(
            (same or made).name, made.marks, made.preamble or bool(same and same.preamble)
        )
    # the longest marks first: Phi-4's `<|im_start|>user<|im_sep|>` before ChatML's `<|im_start|>user`
    return tuple(sorted(found.values(), key=lambda notation: (-len(notation.marks.pattern), notation.name)))


NOTATIONS = _all_notations()
_MARKS = {text.strip() for conv in _KNOWN if conv.name not in _PLAIN for text in (conv.user[0], conv.assistant)}
_SYSTEM_MARKS = {conv.system[0].strip().split("\n\n")[0] for conv in _KNOWN}
BEGINS = _longest_first({conv.begin for conv in _KNOWN if conv.name != "alpaca"} | {"<|startoftext|>"})
HEADS = _longest_first({*_MARKS, *_SYSTEM_MARKS, *BEGINS, FAMILIES["alpaca"].begin[:22]})
TAILS = _longest_first({conv.assistant or conv.user[1] for conv in _KNOWN if conv.name != "deepseek_v2"})
OPENS = _longest_first({conv.opens for conv in _KNOWN})
# What templates write behind a turn, and tokenizers' end-of-text tokens that files hold besides
STOPS = _longest_first(
    {conv.stop_str for conv in _KNOWN} | {"<eos>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "<|return|>"}
)
STOP_LETTERS = frozenset(mark[-1] for mark in STOPS)
HEAD_LETTERS = frozenset(mark[0] for mark in HEADS)
TAIL_LETTERS = frozenset(mark[-1] for mark in (*TAILS, *OPENS)) | {":", "：", "*"}
CLOSES = _longest_first(
    {end for conv in _KNOWN for end in (conv.user[1] if conv.assistant else "", conv.system[1], conv.turn_end)}
    - {FAMILIES["llama2"].system[1]}
    | {*STOPS, *BEGINS}
)

_LABEL = r"(?:\[Round \d+\]\s*)?(?:#{1,4} ?|\*\*)?(%s)(?:\*\*)? ?[:：](?:\*\*)?"
_ASKS = "|".join(word for word, role in ROLE_WORDS.items() if role in ("user", "system"))
_REPLIES = "|".join(word for word, role in ROLE_WORDS.items() if role == "assistant")
FIRST_LABEL = re.compile(r"\s*" + _LABEL % _ASKS, re.IGNORECASE)
REPLY_LABEL = re.compile(r"(?<=\n)[ \t]*" + _LABEL % _REPLIES, re.IGNORECASE)
LEADING_REPLY_LABEL = re.compile(r"\s*" + _LABEL % _REPLIES + r"\s*", re.IGNORECASE)
LAST_LABEL = re.compile(r"(?<=[\n >])[ \t]*" + _LABEL % _REPLIES + r"\s*\Z", re.IGNORECASE)
_STOP = "|".join(map(re.escape, STOPS))
GAPS = {"blank line": rf"(?:(?<=\n\n)|{_STOP})", "line": rf"(?:(?<=\n)|{_STOP})", "space": rf"(?:(?<=\s)|{_STOP})"}


@lru_cache(maxsize=64)
def labelled_marks(user: str, reply: str, gap: str) -> re.Pattern[str]:
    """Marks of a dialogue in plain words: those that it begins and ends with, behind a gap (of GAPS) alone."""
    words = {"user": re.escape(user), "assistant": re.escape(reply), "system": "(?i:system)"}
    if ROLE_WORDS[user.lower()] == "system":
        words["user"] = "(?i:" + "|".join(word for word, role in ROLE_WORDS.items() if role == "user") + ")"
    named = "|".join(f"(?P<{kind}>{word})" for kind, word in words.items())
    return re.compile(rf"(?:\A|{GAPS[gap]})[ \t]{{0,8}}" + (_LABEL % named).replace("(" + named + ")", f"(?:{named})"))
