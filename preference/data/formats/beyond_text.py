"""Rows with pictures, video, sound or tool definitions beside their text, which no triple can carry."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

# Words that a column's name is made of, in any case and with any seams: image_path, imgId, VIDEO-FILE, audios
MEDIA = {
    "image": "images", "images": "images", "img": "images", "imgs": "images", "picture": "images",
    "pictures": "images", "pic": "images", "pics": "images", "photo": "images", "photos": "images",
    "pixel": "images", "frame": "images", "frames": "images", "screenshot": "images", "screenshots": "images",
    "video": "videos", "videos": "videos", "clip": "videos", "audio": "audio", "audios": "audio", "wav": "audio",
    "mp3": "audio", "mp4": "videos", "speech": "audio",
}  # fmt: skip
CHINESE = {"图片": "images", "图像": "images", "视频": "videos", "音频": "audio", "语音": "audio"}
TOOLS = {"tools", "functions", "tool_definitions", "function_definitions", "available_tools", "tool_schemas"}
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+\d*")
NOTHING = ("", "[]", "{}", "null", "none", "false", "0")

# Where a processor of a vision or speech model puts what it sees or hears. HTML knows <video> and <audio>, so those
# two count alone on a line, or where a text begins or ends.
PLACE = re.compile(
    r"<image>|<image_soft_token>|<start_of_image>|<\|(?:image|video|audio|vision|AUDIO|IMAGE|VIDEO)[\w]*\|>"
    r"|(?:\A|\n)[ \t]*(?:<(?:video|audio)>|\[IMG\])|(?:<(?:video|audio)>|\[IMG\])[ \t]*(?:\n|\Z)"
)


@functools.lru_cache(maxsize=256)
def columns_beyond(columns: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(column, reason to drop) of those whose name says media or tools, which alone can be read, last."""
    found = []
    for column in columns:
        words = [word.lower() for word in WORD.findall(column)]
        media = next((MEDIA[word] for word in words if word in MEDIA), None)
        media = media or next((reason for part, reason in CHINESE.items() if part in column), None)
        if media:
            found.append((column, media))
        elif "_".join(words) in TOOLS:
            found.append((column, "tool_calls"))
    return tuple(sorted(found, key=lambda each: each[1] == "tool_calls"))


def carried_beyond_text(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reason, detail) of a row that has media or tools in a column of their own."""
    for column, reason in columns_beyond(tuple(row)):
        value = row[column]
        if value is None or not value or (isinstance(value, str) and value.strip().casefold() in NOTHING):
            continue
        what = "cannot carry tools" if reason == "tool_calls" else "carries text alone"
        return reason, f"the row has {column}: a triple {what}; --ignore_columns {column} if it means nothing"
    return None


def placed_in_text(text: Any) -> str | None:
    """The mark of a picture, video or sound in a question; None without."""
    if not isinstance(text, str) or ("<" not in text and "[IMG]" not in text):
        return None
    match = PLACE.search(text)
    return match[0].strip() if match else None
