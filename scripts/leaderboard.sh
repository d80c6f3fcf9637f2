#!/usr/bin/env bash
# The leaderboard: every arm of workflow/arms.yaml made, scored and compared, over three seeds; snakemake runs the steps.
#
#   bash scripts/leaderboard.sh                          all arms but those marked more, seeds 42, 43, 44, two lanes
#   bash scripts/leaderboard.sh --dry_run                the plan: every command, hours, memory; runs nothing
#   bash scripts/leaderboard.sh --quick                  a few arms, steps and prompts: whether everything runs
#   bash scripts/leaderboard.sh --only tuned_moe,mix     these arms and what they are made of
#   bash scripts/leaderboard.sh --durability             key rows fine-tuned on harmful rows: how long refusals last
#   bash scripts/leaderboard.sh --preset own.yaml        another model (its name and data stand in the preset)
#   bash scripts/leaderboard.sh -- --cores 8             snakemake's own words: lanes, --executor slurm --jobs 20, ...
#
# Also --seeds 42,43,44, --more (the arms marked more too), --arms FILE (a table of your own), --name, --output_dir. Killed at any
# step and started again, it goes on; a step that fails stops what needs it and nothing else. What is finished is told by manifests,
# not by time stamps. Protocol: docs/leaderboard_protocol.md.
set -euo pipefail
cd "$(dirname "$0")/.."

for word in "$@"; do
  case $word in
    --) break ;;
    -h|--help) sed -n '2,14p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
  esac
done
case " $* " in
  *" --dry_run "*) [ ! -x .venv/bin/python ] || PATH=$PWD/.venv/bin:$PATH ;;
  *) . scripts/environment.sh; HF_HUB_OFFLINE=1 python -m data.assets fetch ;;
esac
export HF_HUB_OFFLINE=1
exec python -m workflow.leaderboard "$@"
