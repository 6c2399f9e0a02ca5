"""Programs that tests start do without bitsandbytes, as most users' do: its import is a fifth of a process's start."""

import sys

sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # importing it is an ImportError, finding it finds nothing
