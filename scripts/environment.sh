# Sourced by the scripts: makes .venv when it is missing or older than the requirements, and puts it first on the PATH.
# Run by itself it does the first: an install that failed must not pass for one.
[ "${BASH_SOURCE[0]}" != "$0" ] || set -e
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${ABF_VENV:-$ROOT/.venv}
stamp="$VENV/.installed"
want=$(cat "$ROOT/requirements.txt" "$ROOT/requirements.lock" "$ROOT/pyproject.toml" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
  python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python is older than 3.11; name a newer one with PYTHON=..." >&2; exit 2; }
  echo "Installing into $VENV (once; about 3 GB, some minutes) ..."
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
  # torch alone and first: the pinned file, not the newest build that another package's range would pull
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$ROOT/requirements.txt")"
  if "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) or sys.platform != "linux")'; then
    # the very packages that the tests ran with; uv unpacks them in half a minute, pip, where uv finds no registry, in three
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^uv==' "$ROOT/requirements.txt")"
    "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --no-deps -r "$ROOT/requirements.lock" ||
      "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$ROOT/requirements.lock"
  else
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
  fi
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$ROOT"
  echo "$want" >"$stamp"
fi
export PATH="$VENV/bin:$PATH"
# a waiting thread must not spin for long while another process works (config.short_waits)
[ -n "${OMP_WAIT_POLICY:-}" ] || export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
export TOKENIZERS_PARALLELISM=false
