#!/usr/bin/env bash
# Write requirements.lock anew, what requirements.txt pins and what that needs:  bash scripts/lock.sh [arguments of uv]
#
# A version that the lock has stays where it fits (--upgrade: the newest that fits). Needs a package index.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
made=$(mktemp)
trap 'rm -f "$made"' EXIT
cp requirements.lock "$made"   # uv takes the versions that its output file has
# torch is installed before the lock, in the build of the machine, and brings the packages of its CUDA build itself
uv pip compile --quiet requirements.txt --output-file "$made" --python-version 3.11 \
  --python-platform x86_64-unknown-linux-gnu --no-header --no-annotate --no-emit-package torch --no-emit-package uv "$@"
packages=$(grep -v -e '^#' -e '^cuda-' -e '^nvidia-' "$made")
head=$(grep '^#' requirements.lock)
printf '%s\n' "$head" "$packages" >requirements.lock
