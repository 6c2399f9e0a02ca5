#!/usr/bin/env python3
"""An open preference dataset in, triples out: see preference/tokens/convert.py, or --help.

python data/convert.py dpo_zh_demo.json --output train.jsonl --report report.json
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preference.tokens.convert import main

if __name__ == "__main__":
    sys.exit(main())
