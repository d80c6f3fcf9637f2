#!/usr/bin/env bash
# What a leaderboard's seeds leave, but for weights: scores by prompt, answers, manifests, records of steps.
#
#   bash scripts/keep_scores.sh 42,43 [results/leaderboard]     into docs/data/leaderboard_seed_42.tar.xz, ...
#
# Unpacked into a results folder they are finished steps, of which scripts/leaderboard.sh makes the table anew.
set -euo pipefail
cd "$(dirname "$0")/.."

case ${1:-} in -h|--help|'') sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//'; [ -n "${1:-}" ] && exit 0 || exit 2 ;; esac
from=${2:-results/leaderboard}
for seed in ${1//,/ }; do
  [ -d "$from/seed_$seed" ] || { echo "error: $seed: no folder $from/seed_$seed; name a seed and a leaderboard's folder" >&2; exit 2; }
done
for seed in ${1//,/ }; do
  to=$PWD/docs/data/leaderboard_seed_$seed.tar.xz
  # the same files give the same bytes; a name that begins with a point is unfinished
  (cd "$from" && tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --exclude=checkpoints --exclude='.*' \
    --exclude='*.safetensors' --exclude='*.png' --exclude='*.npy' --exclude='*.csv' --exclude='*.jinja' --exclude='*.md' \
    --exclude='tokenizer*' -cf - "seed_$seed" workflow/records/s"$seed"_*) | xz -9e >"$to.part"
  mv "$to.part" "$to"
  du -h "$to"
done
