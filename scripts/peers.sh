#!/bin/sh
# Make a virtual environment with ClevAgent and others: where, and which requirements. Used by the Makefile for `make bench-peers` and
# `make transparency`: apart from development, so that no dependency of the others reaches the tests.
set -eu
venv=$1
requirements=$2
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    for version in 3.13 3.12 3.11; do
        if found=$(sh "$(dirname "$0")/find-python.sh" "$version"); then python=$found; break; fi
    done
fi
if ! "$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "ClevAgent needs Python 3.11 or newer with its venv module; '$python' is not, or has none. Run scripts/setup.sh, or name one: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --requirement "$requirements" --editable .
