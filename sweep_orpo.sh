#!/bin/sh
# Train a grid of runs, one after the other, and compare them.
#
#   sh sweep_orpo.sh learning_rate=5e-4,1e-3 orpo_beta=0.1,0.5,1         every combination; the values of run_orpo.sh else
#   sh sweep_orpo.sh learning_rate=1e-4,2e-4,4e-4,8e-4 --halving         the worse half is left after a part of the epochs
#   sh sweep_orpo.sh loss=dpo,[dpo:0.8,bco_pair:0.2] --max_steps=50      flags for every run as --name=value
#
# Runs go to outputs/sweep; one that has ended is not repeated. The end is a table, comparison.html, and the best command line.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PYTHON=$(sh "$here/setup.sh") || exit 1
export PYTHON
cd "$here"
exec "$PYTHON" -m preference.report.sweep "$@"
