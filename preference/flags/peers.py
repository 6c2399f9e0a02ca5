"""Names that users of other toolkits type and for which no single flag stands here, with what to do instead.

A plain other name of a flag stands with the flag, as `peers`. None of these may be the name of a flag.
"""

from __future__ import annotations

ELSEWHERE = {
    "cutoff_len": "a pair is kept if prompt + answer fits in max_source_length + max_target_length",
}
