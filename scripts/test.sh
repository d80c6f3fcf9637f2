#!/usr/bin/env bash
# Lint and test everything:  bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
export HF_HUB_OFFLINE=1
python -m ruff check .
python -m data.assets fetch
python -m pytest -q "$@"
