#!/usr/bin/env bash
# Lint, check types and test everything:  [WORKERS=3] bash scripts/test.sh [pytest arguments]
#
#   bash scripts/test.sh                     all of it
#   bash scripts/test.sh --cov               the same; ends in the coverage of every file
#   bash scripts/test.sh tests/models -x     lint, types, and these tests up to the first that fails
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
export HF_HUB_OFFLINE=1
python -m ruff check .
python -m mypy & types=$!   # pyproject.toml says which files; beside it, for both leave a core idle
python -m data.assets fetch
wait "$types"
# three workers keep two cores busy: every third waits for a process, a server or a scheduler. A file stays with its worker,
# and so do its fixtures; tests/conftest.py says which files begin first
python -m pytest -q -n "${WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
