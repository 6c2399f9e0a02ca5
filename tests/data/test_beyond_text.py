"""Pictures, video, sound and tool definitions beside or in a text: dropped by name, whatever the column is called."""

from __future__ import annotations

import pytest
from reading import lines, read, triple, write

from preference.data.formats.beyond_text import carried_beyond_text, placed_in_text


@pytest.mark.parametrize(
    "column, reason",
    [
        ("image_path", "images"), ("imgId", "images"), ("Img-File", "images"), ("pixel_values", "images"),
        ("VIDEO_PATH", "videos"), ("video_file", "videos"), ("audioUrl", "audio"), ("wav", "audio"),
        ("图片路径", "images"),
        ("functions", "tool_calls"), ("Tools", "tool_calls"),
    ],
)  # fmt: skip
def test_a_column_of_media_or_tools_is_dropped_by_name(tmp_path, column: str, reason: str) -> None:
    rows, report = read(write(tmp_path, lines(triple(1) | {column: "a/b.bin"})))
    assert rows == [] and report.dropped == {reason: 1}
    assert column in report.examples[reason][0]["detail"]


@pytest.mark.parametrize("column", ["pictured_by", "imagination", "audience", "framework", "clipping", "functionality"])
def test_words_that_only_begin_alike_are_no_media(column: str) -> None:
    assert carried_beyond_text({column: "x"}) is None


@pytest.mark.parametrize("value", [None, "", [], {}, "[]", "null", False, 0])
def test_an_empty_column_says_nothing(value: object) -> None:
    assert carried_beyond_text({"image": value, "tools": value}) is None


@pytest.mark.parametrize(
    "question, mark",
    [
        ("<image>\nWhat is this?", "<image>"), ("See <image> here.", "<image>"), ("<video>\nWhat?", "<video>"),
        ("<|vision_start|><|image_pad|><|vision_end|>What?", "<|vision_start|>"), ("What?\n<audio>", "<audio>"),
        ("[IMG] What?", "[IMG]"), ("How is the <video> tag of HTML written?", None), ("a < b and [1, 2]", None),
    ],
)  # fmt: skip
def test_marks_in_the_question(tmp_path, question: str, mark: str | None) -> None:
    assert placed_in_text(question) == mark
    rows, report = read(write(tmp_path, lines(triple(1, question=question))))
    assert len(rows) == (mark is None) and report.dropped == ({"images": 1} if mark else {})
