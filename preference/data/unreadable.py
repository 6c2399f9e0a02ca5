"""Files that hold no rows as text, or text in another encoding: by their first bytes, with what to do about it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Container
from itertools import pairwise

from preference.data.json_records import Fault

_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "git_lfs_pointer", "a Git-LFS pointer, not the data: fetch it with `git lfs pull`"),
    (b"SQLite format 3\0", "unknown_file", "a SQLite database: write its table as CSV, "
     "`sqlite3 -header -csv FILE 'select * from TABLE' > rows.csv`"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "unknown_file", "an Excel workbook (.xls) or another old Office file: save "
     "the sheet as CSV (UTF-8)"),
    (b"PK\x03\x04", "unknown_file", "an Excel workbook (.xlsx), another Office document or a damaged zip archive: "
     "save the sheet as CSV (UTF-8)"),
    (b"ARROW1", "unknown_file", "Arrow data: give the folder that save_to_disk wrote, not a file of it"),
    (b"\xff\xff\xff\xff", "unknown_file", "Arrow data: give the folder that save_to_disk wrote, not a file of it"),
    (b"ORC", "unknown_file", "an ORC table: write it as parquet"),
    (b"Obj\x01", "unknown_file", "an Avro file: write it as parquet or JSON lines"),
    (b"\x89HDF", "unknown_file", "an HDF5 file: write its rows as JSON lines"),
    (b"\x93NUMPY", "unknown_file", "a numpy array: write its rows as JSON lines"),
    (b"7z\xbc\xaf'\x1c", "unknown_file", "a 7z archive: unpack it first"),
    (b"Rar!", "unknown_file", "a RAR archive: unpack it first"),
    (b"%PDF", "unknown_file", "a PDF document"),
)  # fmt: skip
_ZEROS = 0.02  # share of NUL bytes at every second place from which text is taken for UTF-16


def refusal(head: bytes) -> Fault | None:
    """What a file with these first bytes (unpacked) is, as a Fault, if no rows can be read from it."""
    for magic, reason, detail in _KINDS:
        if head.startswith(magic):
            return Fault(1, reason, detail, whole=True)
    if head[257:262] == b"ustar":
        detail = "a tar archive that is damaged, or in a compression that tar does not know: unpack it first"
        return Fault(1, "unknown_file", detail, whole=True)
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        detail = "a Python pickle, which may run code when it is read: write JSON lines"
        return Fault(1, "unknown_file", detail, whole=True)
    encoding = other_encoding(head)
    if encoding:
        detail = f"the text is not UTF-8, it looks like {encoding[0]}: say --encoding {encoding[1]}"
        return Fault(1, "other_encoding", detail, whole=True)
    return None


def other_encoding(head: bytes) -> tuple[str, str] | None:
    """(name, Python's name) of the encoding that text is clearly written in, if it is not UTF-8."""
    even, odd = head[:4096:2], head[1:4096:2]
    zeros = even.count(0), odd.count(0)  # 一 has a zero byte too, in the other place
    if max(zeros) > max(4, _ZEROS * len(even)) and min(zeros) * 5 < max(zeros):
        return "UTF-16 without a byte-order mark", "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    lines = [line for line in head.split(b"\n")[:200] if not line.isascii()]
    foreign = [line for line in lines[: max(1, len(lines) - 1)] if not _decodes(line, "utf-8")]
    if not foreign or len(foreign) * 2 < len(lines):
        return None
    return next((names for names, is_it in _CJK.items() if all(map(is_it, foreign[:50]))), None)


def _decodes(line: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(line, final=False)
    except UnicodeDecodeError:
        return False
    return True


def _in_pairs(encoding: str, rows: Container[int]) -> Callable[[bytes], bool]:
    """Whether a line is in a Chinese encoding: nearly all of it that is not ASCII are pairs in its common rows."""

    def is_it(line: bytes) -> bool:
        if not _decodes(line, encoding):
            return False
        pairs = common = i = 0
        while i < len(line) - 1:
            if line[i] < 0x80:
                i += 1
                continue
            pairs += 1
            common += line[i] in rows
            i += 2
        return pairs > 0 and common >= 0.8 * pairs and _mostly_wide(line, encoding)

    return is_it


def _mostly_wide(line: bytes, encoding: str) -> bool:
    """Whether what is not ASCII is Chinese script or its punctuation (Western text read so gives odd characters)."""
    text = line.decode(encoding, "ignore")
    wide = [char for char in text if char > "\x7f"]
    usual = sum("\u4e00" <= char <= "\u9fff" or "\u3000" <= char <= "\u303f" or char >= "\uff00" for char in wide)
    runs = sum(a > "\x7f" and b > "\x7f" for a, b in pairwise(text))
    return usual >= 0.8 * len(wide) and runs * 2 >= len(wide)


_CJK = {  # by the first bytes of pairs: punctuation and the first level of GB 2312; the common part of Big5
    ("GBK (GB18030)", "gb18030"): _in_pairs("gb18030", {0xA1, 0xA3, *range(0xB0, 0xD8)}),
    ("Big5", "big5"): _in_pairs("big5", range(0xA1, 0xC7)),
}
