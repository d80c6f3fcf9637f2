#!/usr/bin/env bash
# The whole H3Fusion path on the embedded default: three experts, their fusion, its tuning, answers, scores, a table.
#
#   bash scripts/quickstart.sh              one seed, subsets of the test sets
#   bash scripts/quickstart.sh --lite       without the 358 MB BIG-bench archive (no HHH, no MC1/MC2)
#   bash scripts/quickstart.sh --full       three seeds (42, 43, 44), with intervals across them
#   bash scripts/quickstart.sh --seed 7     another seed, in results/seed_7
#
# SAMPLES=-1 OUT=results/whole bash scripts/quickstart.sh takes whole test sets instead of 48 prompts of each.
# Every step is a command that you can run by itself; what is finished is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."

words=("$@") lite=() seeds=(42) samples=${SAMPLES:-48} root=${OUT:-results} name=quickstart
while [ $# -gt 0 ]; do
  case $1 in
    --lite) lite=(--lite); name=quickstart_lite ;;
    --full) seeds=(42 43 44); name=quickstart_full ;;
    --seed) [ $# -gt 1 ] || { echo "error: --seed needs a number" >&2; exit 2; }
            case $2 in *[!0-9]*|'') echo "error: --seed $2: needs a whole number, 0 or more" >&2; exit 2 ;; esac
            seeds=("$2"); shift ;;
    -h|--help) sed -n '2,10p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: $1: unknown; allowed: --lite, --full, --seed N" >&2; exit 2 ;;
  esac
  shift
done

. scripts/environment.sh
export HF_HUB_OFFLINE=1
logs=$root/logs
. scripts/lanes.sh
warm ${words[@]+"${words[@]}"}

tuned=mix_moe_reg_00010_00010_00010_gate_01000
others=base,mix,helpfulness,safety,truthfulness,average,raw_moe
# rows that also answer prompts; the others are scored by likelihood alone
key=mix,raw_moe,$tuned

folders() { # RUNS: their folders of scores
  local names=cross_${1//,/,cross_}
  printf %s "${names/cross_base/raw}"
}
answers() { # RUNS: what the keyword judge reads
  say python inference.py --task_name safety --cross_task "$1" --num_samples "$samples" "${common[@]}"
  say python inference.py --task_name overrefusal --cross_task "$1" --num_samples "$samples" "${common[@]}"
}
likelihoods() { # RUNS: refusal and helpfulness without an answer; preferences (HHH) are left to the leaderboard
  say python evaluator/evaluate_refusal.py --task_name "$(folders "$1")" --num_samples "$samples" "${common[@]}"
  say python evaluator/evaluate_helpfulness.py --task_name "$(folders "$1")" --num_samples "$samples" --lite "${common[@]}"
}
honesty() { # RUNS: multiple choice, as long as everything else of a row
  say python evaluator/evaluate_truth_and_info.py --task_name "$(folders "$1")" --num_samples "$samples" "${lite[@]}" \
    "${common[@]}"
}
untuned() { # scores of all rows but the tuned MoE, while it is tuned and scored
  likelihoods "$others"
  honesty base,mix,raw_moe
}

step "model and data"
say python -m data.assets fetch "${lite[@]}"

roots=()
for seed in "${seeds[@]}"; do
  out=$root; [ "$seed" = 42 ] || out=$root/seed_$seed
  roots+=("$out")
  common=(--seed "$seed" --output_dir "$out" --threads "$half")
  step "three experts; beside them the naive mix as a control (seed $seed)"
  beside "mix_$seed" say python align_basemodel.py --moe_flag 0 --task_name mix "${common[@]}"
  for task in helpfulness safety truthfulness; do
    say python align_basemodel.py --moe_flag 0 --task_name $task "${common[@]}"
  done
  step "fuse: plain average of the deltas as a control, raw MoE (seed $seed)"
  say python models/fuse.py adapters --run_name average "${common[@]}"
  say python models/llama_moe.py "${common[@]}"
  join
  step "tune the fused MoE; scores of all others (seed $seed)"
  beside "scores_$seed" untuned
  say python align_basemodel.py --moe_flag 1 --expert_topk 1 --gate_loss_weight 0.1 --helpfulness_weight 0.001 \
    --safety_weight 0.001 --truthfulness_weight 0.001 "${common[@]}"
  answers $key
  say python evaluator/evaluate_safety.py --task_name "$(folders $key)" --num_samples "$samples" "${common[@]}"
  likelihoods $tuned
  honesty $tuned
  join
  # every score is there: this draws the ROC curves of all rows into one picture
  say python evaluator/evaluate_refusal.py --task_name "$(folders $others,$tuned)" --num_samples "$samples" "${common[@]}"
done

step "report"
labels="base=base,helpful expert=helpfulness,harmless expert=safety,honest expert=truthfulness,naive mix=mix"
labels+=",plain average=average,raw MoE=raw_moe,tuned MoE=$tuned"
say python evaluator/report.py --runs "$labels" --roots "$(IFS=,; echo "${roots[*]}")" --name $name --control mix \
  --columns refusal_auc,refusal_auc_plain,refusal_auc_edgy,refusal_auc_length,refusal_at_10,pairs_ranked \
  --output_dir "$root"
printf '\nDone in %d s. Report: %s\nRouter heat-maps: %s\n' $((SECONDS - start)) "$root/report/$name.md" \
  "$root/observation/*_$tuned.png"
