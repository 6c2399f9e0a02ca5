#!/bin/sh
# Find or make the Python environment, and print the path of its interpreter.
#
#   PYTHON=$(sh setup.sh)                      what training needs: requirements.txt
#   PYTHON=$(sh setup.sh requirements-dev.txt) and what the tests need
#
# The path goes to stdout, every message to stderr. The first of these is used:
#
#   1. PYTHON=/path/to/python, if you set it. It must hold every package; versions that differ from the pins are named in a
#      warning and used. This is the way to run on a GPU image whose torch is older. Nothing is ever installed into it.
#   2. The active environment (venv, conda, image), if its packages have exactly the pinned versions.
#   3. .venv beside this file. It is made once, and installed again only when the requirements change.
#
# An interrupted installation is taken up again by the next run, and two runs at once wait for each other. Python 3.10 or newer
# with venv is all that must be there. Of your environment, setup.sh passes on:
#
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu   where torch is looked for besides; this one has small CPU-only builds
#   PIP_INDEX_URL=... PIP_FIND_LINKS=... HTTPS_PROXY=...   pip's own: a mirror, a folder of wheels, a proxy

set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
wanted=${1:-requirements.txt}
venv=$here/.venv

say() { (printf 'setup: %s\n' "$*") >&2 2>/dev/null || :; } # words that nobody reads end nothing
fail() { say "$@"; exit 1; }
usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, int(sys.argv[1])))' "$2" 2>/dev/null; }

# Compare the installed versions with the pins of "$wanted", without importing a package (importing torch takes seconds).
# Prints one line a difference; exits with 0: all as pinned, 3: other versions, 4: packages missing.
compare_with_pins() {
    "$1" - "$here/$wanted" <<'PYTHON_CODE'
import platform, re, sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PIN = re.compile(r"([\w.-]+)==([\w.+!-]+)\s*(?:;\s*([^#]+))?(?:#.*)?$")
HERE = {"python_version": sys.version_info[:2], "platform_machine": platform.machine(), "sys_platform": sys.platform}

def applies(marker):
    """Whether a pin is for this machine: its marker, with versions as numbers, is a Python expression."""
    numbers = re.sub(r'python_version\s*(<|>=)\s*"(\d+)\.(\d+)"', r"python_version \1 (\2, \3)", marker)
    return eval(numbers, {"__builtins__": {}}, HERE)

def pins(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from pins(path.with_name(line[3:].strip()))
        elif line.strip() and not line.startswith("#"):
            name, pinned, marker = PIN.match(line).groups()
            if marker is None or applies(marker):
                yield name, pinned

other, missing = [], []
for name, pinned in pins(Path(sys.argv[1])):
    try:
        found = version(name)
        if found != pinned and found.split("+")[0] != pinned:  # torch 2.13.0+cpu is torch 2.13.0
            other.append(f"{name} {found} (pinned: {pinned})")
    except PackageNotFoundError:
        missing.append(f"{name}=={pinned}")
if other:
    print("other versions: " + ", ".join(other))
if missing:
    print("missing: " + " ".join(missing))
sys.exit(4 if missing else 3 if other else 0)
PYTHON_CODE
}

use() {
    say "using $1 ($2)"
    printf '%s\n' "$1"
    exit 0
}

# ---- 1. the interpreter that the user named
if [ -n "${PYTHON:-}" ]; then
    python=$(command -v -- "$PYTHON") || fail "PYTHON=$PYTHON is not there"
    case $python in /*) ;; *) python=$PWD/$python ;; esac
    usable "$python" 10 || fail "PYTHON=$PYTHON is not a Python 3.10 or newer"
    status=0
    difference=$(compare_with_pins "$python") || status=$?
    case $status in
        0) use "$python" "PYTHON, versions as pinned" ;;
        3) say "warning: $difference"
            say "warning: they are used as PYTHON asks; the tests were passed with the pinned versions"
            use "$python" "PYTHON" ;;
        4) say "PYTHON=$python cannot be used as it is. $difference"
            fail "install them ($python -m pip install ...), or unset PYTHON and let setup.sh make .venv" ;;
        *) fail "PYTHON=$python could not be asked for its packages" ;;
    esac
fi

# ---- 2. the active environment; .venv itself, when activated, is left to step 3, which sees an interrupted installation
for name in python3 python; do
    python=$(command -v "$name") || continue
    case $python in "$venv"/*) continue ;; esac
    status=0
    difference=$(compare_with_pins "$python" 2>/dev/null) || status=$?
    [ "$status" != 0 ] || use "$python" "the active environment, versions as pinned"
    [ "$status" != 3 ] || different="$python has $difference"
done

# ---- 3. .venv; a copy of each requirements file is put into it last, and tells that its installation was completed
is_complete() {
    cmp -s "$here/requirements.txt" "$venv/requirements.txt" && cmp -s "$here/$wanted" "$venv/$wanted" &&
        compare_with_pins "$venv/bin/python" >/dev/null 2>&1
}
if is_complete; then use "$venv/bin/python" .venv; fi
[ -z "${different:-}" ] || say "not taking the active environment: $different. To use it as it is, set PYTHON to it"

find_base() { # the Python to make .venv with; 3.10 is the last choice, because the newest transformers and trl left it behind
    for oldest in 11 10; do
        for name in python3 python python3.13 python3.12 python3.11 python3.14 python3.10; do
            base=$(command -v "$name") || continue
            if usable "$base" "$oldest"; then return; fi
        done
    done
    fail "no Python 3.10 or newer in PATH (looked for python3, python, python3.10 ... python3.14)." \
        "Install one, or make the environment with one elsewhere: /path/to/python -m venv $venv"
}
if usable "$venv/bin/python" 10; then base=$venv/bin/python; else find_base; fi

# The lock is held by this shell and by the pip it starts, through file descriptor 9: the system frees it when both are gone.
exec 9>"$here/.setup.lock"
"$base" -c '
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another setup.sh in this folder", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
' || say "this file system has no locks: do not start two runs at once the first time"
if is_complete; then use "$venv/bin/python" ".venv, made by the other setup.sh"; fi


if usable "$venv/bin/python" 10; then base=$venv/bin/python; fi # asked again: the other setup.sh may have made it meanwhile
if [ "$base" != "$venv/bin/python" ]; then
    say "making .venv with $base ($("$base" --version 2>&1))"
    "$base" -c 'import venv, ensurepip' 2>/dev/null || fail "$base comes without venv. On Debian and Ubuntu:" \
        "apt install python3-venv; or set PYTHON to an interpreter that has the packages of requirements.txt"
    "$base" -m venv --clear "$venv" >&2 || fail "could not make $venv with $base -m venv"
elif ! "$base" -m pip --version >/dev/null 2>&1; then # a making that was cut short, or an environment made without pip
    "$base" -m ensurepip >/dev/null 2>&1 || fail "$venv has no pip and cannot get it: remove the folder and run again"
fi

# A package whose copying was cut short has no INSTALLER yet: pip would take it for installed, so its record is removed.
for record in "$venv"/lib/python*/site-packages/*.dist-info; do
    [ ! -d "$record" ] || [ -e "$record/INSTALLER" ] || rm -rf "$record"
done

say "installing $wanted into .venv; the first time this takes minutes and up to 6 GB with the CUDA libraries"
[ -n "${TORCH_INDEX_URL:-}" ] || command -v nvidia-smi >/dev/null ||
    say "no NVIDIA GPU seen: TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu gets a smaller torch, see the top of setup.sh"
quiet=-q
[ ! -t 2 ] || quiet=
PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install ${quiet:+"$quiet"} \
    ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r "$here/$wanted" >&2 ||
    fail "pip could not install $wanted (see above). Run the same command again: it resumes where it stopped." \
        "Behind a mirror or proxy set PIP_INDEX_URL or HTTPS_PROXY"

for file in requirements.txt "$wanted"; do
    cp "$here/$file" "$venv/$file.new"
    mv "$venv/$file.new" "$venv/$file"
done
is_complete || fail "the installation went through, but: $(compare_with_pins "$venv/bin/python" 2>&1)"
use "$venv/bin/python" .venv
