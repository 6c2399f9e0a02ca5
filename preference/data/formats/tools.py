"""What clouds and labelling tools write: Amazon Nova, Vertex, PaddleNLP, HALOs, OpenAI's summaries, Label Studio."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from preference.data.formats.base import RANKED, Drop, Format, Options, Pair, RowDict, number, take
from preference.data.formats.messages import pair_of_context, reply_of, text_of, turns_of
from preference.data.formats.named import question_of
from preference.data.formats.scores import pick
from preference.data.formats.sides import Sides
from preference.data.formats.trl import pair_of_prompt
from preference.data.formats.verdict import place_of


def nova(row: RowDict, options: Options) -> Iterator[Pair]:
    """The last message holds the candidates, each preferred or non-preferred."""
    (messages,) = take(row, "messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
        raise Drop("wrong_type", "messages must be a list whose last holds the candidates")
    candidates = messages[-1].get("candidates")
    sides: dict[str, str] = {}
    for candidate in candidates if isinstance(candidates, list) else ():
        if isinstance(candidate, dict):
            label = str(candidate.get("preferenceLabel"))
            if label in sides:
                raise Drop("wrong_label", f"two candidates are {label}")
            sides[label] = reply_of({"role": "assistant", "content": candidate.get("content")})
    if set(sides) != {"preferred", "non-preferred"}:
        raise Drop("wrong_label", f"the candidates must be preferred and non-preferred, not {', '.join(sides)[:60]}")
    yield pair_of_context(turns_of(messages[:-1]), sides["preferred"], sides["non-preferred"])


def _has_candidates(row: RowDict) -> bool:
    messages = row["messages"]
    return isinstance(messages, list) and bool(messages) and isinstance(messages[-1], dict) and (
        messages[-1].get("candidates") is not None
    )  # fmt: skip


def vertex(row: RowDict, options: Options) -> Iterator[Pair | Drop]:
    """Gemini's contents of {role, parts} and completions with a score each."""
    contents, completions = take(row, "contents", "completions")
    if not all(
        isinstance(value, list) and all(isinstance(v, dict) for v in value) for value in (contents, completions)
    ):
        raise Drop("wrong_type", "contents and completions must be lists of objects")
    turns = turns_of([_of_parts(content) for content in contents])
    system = row.get("systemInstruction") or row.get("system_instruction")
    system = text_of(_of_parts(system)["content"]) if isinstance(system, dict) else system
    candidates = []
    for completion in completions:
        score = number(completion.get("score"))
        if score is None:
            raise Drop("no_score", "a completion without a score")
        (answer,) = take(completion, "completion")
        candidates.append((reply_of(_of_parts(answer) | {"role": "model"}), score))
    for picked in pick(candidates, options, str(turns)):
        yield picked if isinstance(picked, Drop) else pair_of_context(turns, picked[0], picked[1], system, picked[2])


def _of_parts(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("parts"), list):
        raise Drop("wrong_type", "contents must be a list of objects with role and parts")
    return {"role": content.get("role", "user"), "content": content["parts"]}


def _is_vertex(row: RowDict) -> bool:
    lists = [row["contents"], row["completions"]]
    return all(
        isinstance(value, list) and value and all(isinstance(v, dict) for v in value) for value in lists
    ) and all(isinstance(completion.get("completion"), dict) for completion in row["completions"])


def paddle(row: RowDict, options: Options) -> Iterator[Pair]:
    """Turns of the user in src, of the assistant in tgt; two responses, of which the higher `sort` is better."""
    source, responses, order = take(row, "src", "response", "sort")
    questions, answers = _texts(source), _texts(row.get("tgt") or [])
    sorts = (
        [found for value in order if (found := number(value)) is not None] if isinstance(order, (list, tuple)) else []
    )
    if len(sorts) != 2 or not isinstance(responses, (list, tuple)) or len(responses) != 2:
        raise Drop("wrong_type", "response and sort must be lists of two")
    if sorts[0] == sorts[1]:
        raise Drop("tie", "both responses have the same sort")
    if not questions or len(answers) != len(questions) - 1:
        raise Drop("irregular_turns", f"{len(questions)} turns in src, {len(answers)} in tgt")
    texts = [_texts(response) for response in responses]
    if any(len(text) != 1 for text in texts):
        raise Drop("irregular_turns", "a response of several turns")
    best = int(sorts[1] > sorts[0])
    history = list(zip(questions, answers, strict=False))
    yield Pair(questions[-1], texts[best][0], texts[1 - best][0], row.get("system"), history)


def _texts(value: Any) -> list[str]:
    found: list[Any] = (
        [value] if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else [None]
    )
    if not all(isinstance(text, str) for text in found):
        raise Drop("wrong_type", "src, tgt and response must be text or lists of texts")
    return found


def halos(row: RowDict, options: Options) -> Iterator[Pair]:
    """Label 1 prefers output_A."""
    prompt, first, second, label = take(row, "prompt", "output_A", "output_B", "label")
    if number(label) not in (0, 1):
        raise Drop("wrong_label", f"label must be 1 (output_A is better) or 0, not {str(label)[:40]!r}")
    sides = (first, second) if number(label) == 1 else (second, first)
    pair = pair_of_prompt(prompt, *sides)
    pair.prompt = None
    yield pair


def summaries(row: RowDict, options: Options) -> Iterator[Pair]:
    """OpenAI's comparisons of summaries; the question is written as in the paper (Stiennon et al. 2020, appendix B)."""
    info, found, choice = take(row, "info", "summaries", "choice")
    if not isinstance(info, dict) or not isinstance(found, (list, tuple)):
        raise Drop("wrong_type", "info must be an object and summaries a list")
    texts = [summary.get("text") if isinstance(summary, dict) else None for summary in found]
    if len(texts) != 2 or number(choice) not in (0, 1):
        raise Drop("wrong_label", f"choice must name one of two summaries, not {str(choice)[:40]!r}")
    labels = (("SUBREDDIT", "subreddit"), ("TITLE", "title"), ("POST", "post"), ("ARTICLE", "article"))
    parts = [f"{name}: {info[key]}" for name, key in labels if info.get(key)]
    best = int(number(choice) or 0)
    yield Pair("\n\n".join([*parts, "TL;DR:"]), texts[best], texts[1 - best])


def _comparisons(annotations: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for annotation in annotations:
        results = annotation.get("result") if isinstance(annotation, dict) else None
        if isinstance(results, (list, tuple)) and not annotation.get("was_cancelled"):
            yield from (r for r in results if isinstance(r, dict) and r.get("type") == "pairwise")


def label_studio(row: RowDict, options: Options) -> Iterator[Pair]:
    """An export of a pairwise project: data, and annotations whose results select left or right."""
    data, annotations = take(row, "data", "annotations")
    if not isinstance(data, dict) or not isinstance(annotations, (list, tuple)):
        raise Drop("wrong_type", "data must be an object and annotations a list")
    results = list(_comparisons(annotations))
    if not results:
        raise Drop("wrong_label", "nobody has compared the two answers")
    first, _, second = str(results[0].get("to_name")).partition(",")
    names = (first, second)
    if not all(isinstance(data.get(name), str) for name in names):
        raise Drop("missing_key", f"the data has no texts called {first[:80]} and {second[:80]}")
    sides = Sides(names, ("left", "right"), (), None)
    place = place_of([result.get("value") for result in results], sides)
    if not isinstance(place, int):
        raise Drop("wrong_label" if place is None else "tie", "the annotators do not prefer one of the answers")
    yield Pair(question_of(data, names), data[names[place]], data[names[1 - place]])


NOVA = Format(
    name="nova",
    what="Amazon Nova: messages whose last holds candidates with a preferenceLabel",
    needs=("messages",),
    also=_has_candidates,
    answers=frozenset({"messages"}),
    pairs=nova,
)
VERTEX = Format(
    name="vertex",
    what="Vertex AI: contents and completions with scores",
    needs=("contents", "completions"),
    also=_is_vertex,
    answers=frozenset({"completions"}),
    pairs=vertex,
    scored=True,
    reads=lambda row: ("systemInstruction", "system_instruction"),
    uses=RANKED,
)
PADDLE = Format(
    name="paddlenlp",
    what="PaddleNLP: src, tgt, response and sort (higher is better)",
    needs=("src", "response", "sort"),
    answers=frozenset({"response"}),
    pairs=paddle,
    sure=True,
    reads=lambda row: ("tgt",),
)
HALOS = Format(
    name="halos",
    what="HALOs: output_A, output_B and a label, 1 for A",
    needs=("prompt", "output_A", "output_B", "label", "type|prompt_key|reward_difference"),
    answers=frozenset({"output_A", "output_B"}),
    pairs=halos,
    sure=True,
)
SUMMARIES = Format(
    name="summarize",
    what="openai/summarize_from_feedback: info, summaries, choice",
    needs=("info", "summaries", "choice"),
    also=lambda row: isinstance(row["info"], dict) and isinstance(row["summaries"], list),
    answers=frozenset({"summaries"}),
    pairs=summaries,
)
LABEL_STUDIO = Format(
    name="label-studio",
    what="Label Studio's export of a pairwise project",
    needs=("data", "annotations"),
    also=lambda row: isinstance(row["data"], dict) and isinstance(row["annotations"], list),
    answers=frozenset({"data"}),
    pairs=label_studio,
)
