#!/bin/sh
# Make a virtual environment for development: where, which group of pyproject.toml, with which pinned versions. Used by the Makefile.
set -eu
venv=$1
group=$2
constraints=$3
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    for version in 3.13 3.12 3.11; do
        if found=$(sh "$(dirname "$0")/find-python.sh" "$version"); then python=$found; break; fi
    done
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "ClevAgent needs Python 3.11 or newer; '$python' is not. Install one, or name it: make PYTHON=/path/to/python3.11" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    # Debian keeps venv in a package of its own.
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if command -v apt-get >/dev/null 2>&1 && [ "$(id -u)" = 0 ]; then
        apt-get update -qq && apt-get install -y -qq "python$version-venv"
    else
        echo "'$python' has no venv module. Install it (on Debian: apt-get install python$version-venv) and run make again." >&2
        exit 1
    fi
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# pip learned --group in 25.1.
"$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
"$venv/bin/python" -m pip install --quiet --constraint "$constraints" --editable . --group "$group"
