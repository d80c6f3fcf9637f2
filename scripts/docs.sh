#!/usr/bin/env bash
# The site of docs/, as files in build/site that open from the file system (their search needs a server).
#
#   bash scripts/docs.sh             reference pages made anew, then the site; a dead link ends it
#   bash scripts/docs.sh --serve     the same, then a server on port 8000 that follows changes
#
# The first start installs what pyproject.toml pins as the extra docs.
set -euo pipefail
cd "$(dirname "$0")/.."
serve=
case ${1:-} in
  '') ;;
  --serve) serve=yes ;;
  -h|--help) sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
  *) echo "error: $1: unknown; allowed: --serve" >&2; exit 2 ;;
esac
. scripts/environment.sh
python -c 'import material' 2>/dev/null || python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
python scripts/reference.py
# the theme advertises its successor
export NO_MKDOCS_2_WARNING=1
python -m mkdocs build --strict --quiet
echo "build/site/index.html"
[ -z "$serve" ] || exec python -m mkdocs serve
