"""Preference tuning: what the scripts are made of, one idea a file."""

import warnings

# PEFT asks transformers for it under the name it had before 5.x; there is nothing a user could do about it.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
