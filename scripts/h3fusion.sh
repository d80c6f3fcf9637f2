#!/usr/bin/env bash
# The published sweep: lambda (gating loss), gamma (drift, one expert at a time) and top-k, one run after the other.
#
#   bash scripts/h3fusion.sh                                   embedded default
#   PRESET=h3fusion bash scripts/h3fusion.sh                   Llama-2-7b with the published settings
#   LAMBDAS="0.01 0.1" GAMMAS="" TOPKS="2" bash scripts/h3fusion.sh      an empty list leaves that part out
#   bash scripts/h3fusion.sh --dry_run                         print the commands, run nothing
#
# Extra words go to every training command, e.g.  bash scripts/h3fusion.sh --max_steps 50
# A sweep that was cut off goes on where it stopped: finished runs are not trained again.
# The same sweeps as tables, with hours, memory and the paper's judges: bash scripts/paper_tables.sh --paper h3fusion
set -euo pipefail
cd "$(dirname "$0")/.."

extra=() dry=''
for word in "$@"; do
  case $word in
    -h|--help) sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    --dry_run) dry=yes ;;
    *) extra+=("$word") ;;
  esac
done
[ -n "$dry" ] || . scripts/environment.sh

PRESET=${PRESET:-embedded}
OUT=${OUT:-results}
LAMBDAS=${LAMBDAS-"0 0.01 0.1 1.0"}
GAMMAS=${GAMMAS-"0.0001 0.001 0.01 0.1 1.0"}
TOPKS=${TOPKS-"1 2 3"}
SAMPLES=${SAMPLES:-100}
common=(--preset "$PRESET" --output_dir "$OUT")
runs=()

say() { # a command: print it, then run it
  printf '$ python'; printf ' %q' "$@"; printf '\n'
  [ -n "$dry" ] || python "$@"
}
tune() { # name, then the flags that make this run
  local name=$1; shift
  say align_basemodel.py --moe_flag 1 --run_name "$name" "$@" "${common[@]}" ${extra[@]+"${extra[@]}"}
  runs+=("$name")
}
digits() { printf '%.4f' "$1" | tr -d .; }

for task in helpfulness safety truthfulness; do
  say align_basemodel.py --moe_flag 0 --task_name "$task" "${common[@]}" ${extra[@]+"${extra[@]}"}
done
say models/llama_moe.py "${common[@]}"

for l in $LAMBDAS; do
  tune "mix_moe_reg_00000_00000_00000_gate_$(digits "$l")" --expert_topk 2 --gate_loss_weight "$l"
done
for g in $GAMMAS; do
  d=$(digits "$g")
  tune "mix_moe_reg_${d}_00000_00000_gate_00100" --gate_loss_weight 0.01 --helpfulness_weight "$g"
  tune "mix_moe_reg_00000_${d}_00000_gate_00100" --gate_loss_weight 0.01 --safety_weight "$g"
  tune "mix_moe_reg_00000_00000_${d}_gate_00100" --gate_loss_weight 0.01 --truthfulness_weight "$g"
done
for k in $TOPKS; do
  tune "mix_moe_reg_00000_00000_00000_gate_00100_top$k" --gate_loss_weight 0.01 --expert_topk "$k"
done

list=$(IFS=,; echo "${runs[*]}")
folders=cross_${list//,/,cross_}
say inference.py --task_name safety --cross_task "$list" --num_samples "$SAMPLES" "${common[@]}"
# harmless prompts are embedded alone: a published preset has none of its own
say inference.py --task_name overrefusal --data_source embedded --cross_task "$list" --num_samples "$SAMPLES" "${common[@]}"
for judge in safety helpfulness truth_and_info; do
  say evaluator/evaluate_$judge.py --task_name "$folders" --num_samples "$SAMPLES" "${common[@]}"
done
say evaluator/report.py --runs "$list" --name h3fusion_sweep --output_dir "$OUT" --preset "$PRESET"
