#!/bin/sh
# Print the path of a working Python of a version, such as 3.13; fail where there is none. Used by setup.sh, peers.sh and noxfile.py.
# pyenv puts a python3.13 on the PATH that fails when run, unless that version is the chosen one; so each candidate is run.
set -eu
version=$1

path_of() {
    "$1" -c "import sys; '%d.%d' % sys.version_info[:2] == '$version' or sys.exit(1); print(sys.executable)" 2>/dev/null
}

path_of "python$version" && exit
root=${PYENV_ROOT:-$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")}
for candidate in "$root/versions/$version".*/bin/python; do
    path_of "$candidate" && exit
done
exit 1
