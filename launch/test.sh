#!/usr/bin/env bash
# Makes the environment where it is missing, then runs the linters and the tests: ./launch/test.sh [--quick] [pytest arguments]
# --quick, the first argument: the linters and the core invariants (`pytest -m core`) alone.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
make_environment || exit 1
if [ "${1:-}" = --quick ]; then
    shift
    set -- -m core "$@"
fi

# The tests bring their own models and data; nothing may come from the network. Spawned ranks share the cores.
export HF_HUB_OFFLINE=1
look_at_machine || exit 1

status=0
failed=()
step() {
    echo "== $*"
    "$@" || { status=1; failed+=("$1"); }
}
step ruff check .
step ruff format --check .
step lint-imports --no-logo
step mypy
workers=$(python -c 'import os; print(min(4, os.cpu_count() or 1))') || exit 1
# Single-process tests fill the cores that others leave idle. A file's tests stay together, for what they share.
[ "$accelerated" = True ] || set -- -n "$workers" --dist loadfile "$@"
step python -m pytest "$@"
if [ $status -eq 0 ]; then echo "== all passed"; else echo "== failed: ${failed[*]}"; fi
exit $status
