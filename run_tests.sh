#!/bin/sh
# Pass the tests: no network is needed but for the set-up, no GPU, a few minutes on two CPU cores.
#
#   sh run_tests.sh                         everything
#   sh run_tests.sh -m "not slow"           the quick ones
#   sh run_tests.sh tests/system/test_setup.py -k lock
#
# Extra arguments go to pytest. PYTHON=... names an environment (see setup.sh).

set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
PYTHON=$(sh "$here/setup.sh" requirements-dev.txt) || exit 1
export PYTHON
cd "$here"
if [ ! -d models/SmolLM2-135M-Instruct ]; then # without it the tests that need it are skipped by name
    "$PYTHON" -c 'from preference.models.starter import ensure_starter_model; ensure_starter_model()' || true
fi

# The report is tested in a real browser where there is one; a machine of continuous integration gets it meanwhile.
browser=
if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && ! command -v chromium >/dev/null && command -v apt-get >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 ||
        echo "no Chromium could be installed: the browser tests will be skipped, and say so" &
    browser=$!
fi

if [ $# = 0 ]; then
    PATH=$(dirname "$PYTHON"):$PATH
    export PATH
    hostile=
    if [ "${CI:-}" = true ]; then # a minute of hostile input, the same seeds every time; docs/reliability.md has the hour
        "$PYTHON" tests/system/faults/fuzz.py --minutes 1 --seed 1 &
        hostile=$!
    fi
    echo "ruff, shellcheck, mypy"
    ruff check --output-format concise .
    ruff format --check .
    find . -name '*.sh' -not -path './.venv/*' -exec shellcheck {} +
    mypy 2>&1 | mypy-baseline filter
    [ -z "$hostile" ] || wait "$hostile"
fi

[ -z "$browser" ] || wait "$browser"

# Two worker processes of one thread each use two cores better than one process of two threads: the models of the tests are tiny.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
exec "$PYTHON" -m pytest -q -n "${PYTEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder --durations=15 "$@"
