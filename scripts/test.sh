#!/usr/bin/env bash
# Lint, check types and test everything:  [WORKERS=2] bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
export HF_HUB_OFFLINE=1
python -m ruff check .
python -m mypy   # pyproject.toml says which files
python -m data.assets fetch
python -m pytest -q -n "${WORKERS:-2}" --dist loadfile "$@"   # a file stays with its worker, and so do its fixtures
