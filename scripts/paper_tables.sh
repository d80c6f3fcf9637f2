#!/usr/bin/env bash
# The tables of a paper made anew, through the leaderboard's graph, its published numbers beside ours.
#
#   bash scripts/paper_tables.sh --paper lora_fusion                             the tables that there are
#   bash scripts/paper_tables.sh --paper lora_fusion --table lambda_sweep        one in miniature, on the embedded default
#   bash scripts/paper_tables.sh --paper h3fusion --table 3 --dry_run            its plan: every command, hours, memory
#   bash scripts/paper_tables.sh --paper somf --table all --preset somf_wizardlm --dry_run     as published: hours of a GPU
#   bash scripts/paper_tables.sh --paper somf --table 2 -- --cores 4             snakemake's own words
#
# Papers: h3fusion, somf, lora_fusion; numbers of tables are those of the list, not the paper's. Also --seeds 42,43,44, --only ARM,..,
# --files NAME=FILE (sets that are not public), --judge_model and --judge_base_url (another API judge), --track, --tflops, --gpu_gb (the
# card that hours are reckoned for), --name, --output_dir. Killed and started again, it goes on. What cannot be made is an empty cell
# with its reason. What the tables hold, take and fetch: docs/reproduce.md.
set -euo pipefail
cd "$(dirname "$0")/.."

run=yes
case " $* " in *" --table "*|*" --table="*) ;; *) run='' ;; esac
for word in "$@"; do
  case $word in
    --) break ;;
    -h|--help) sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    --dry_run|help|--table=help) run='' ;;
  esac
done
if [ -n "$run" ]; then
  . scripts/environment.sh
  # published tracks score over-refusal on embedded prompts too
  HF_HUB_OFFLINE=1 python -m data.assets fetch
  # and have models and data of their own, from the hub
  case " $* " in *" --preset"[\ =]*|*" --track"[\ =]*) ;; *) export HF_HUB_OFFLINE=1 ;; esac
elif [ -x .venv/bin/python ]; then
  PATH=$PWD/.venv/bin:$PATH
fi
exec python -m workflow.paper_tables "$@"
