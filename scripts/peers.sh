#!/bin/sh
# Make the virtual environment of `make bench-peers`: ClevAgent and those it is measured beside, pinned in
# benchmarks/peers/requirements.txt. Apart from development, so that no peer's dependency reaches the tests.
set -eu
venv=$1
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    for version in 3.13 3.12 3.11; do
        if found=$(sh "$(dirname "$0")/find-python.sh" "$version"); then python=$found; break; fi
    done
fi
if ! "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "The benchmarks need Python 3.11 or newer with its venv module; '$python' is not. Run scripts/setup.sh, or name one: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --requirement benchmarks/peers/requirements.txt --editable .
