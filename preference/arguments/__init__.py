"""The flags of orpo_train.py. Each is declared once: all that the program knows about it stands there.

Nothing heavy is imported here, so that `--help` is instant. A flag that is unknown, a value that it does not take, and
a flag that the user gave and this run would not use are errors that say what to write instead.

To add a flag, add a field to a group (model.py, data.py, objective.py, run.py). If it shall also be a variable of
run_orpo.sh, add its line there.
"""

from preference.arguments.model import ModelArguments
from preference.arguments.parsing import FLAGS, Arguments, parse_arguments
from preference.arguments.run import STRATEGIES
from preference.flags.declaration import ArgumentError

__all__ = ["FLAGS", "STRATEGIES", "ArgumentError", "Arguments", "ModelArguments", "parse_arguments"]
