#!/usr/bin/env bash
# The whole SOMF path on the embedded default: an aligned model, a task that costs its safety, masks that give it back,
# every control beside them, answers, scores, a table.
#
#   bash scripts/somf.sh                    one task, three mask seeds
#   bash scripts/somf.sh --task maths       another task: english, chinese, maths, summaries
#   bash scripts/somf.sh --full             two tasks more: four plain merges; masks, random masks and all other controls on
#                                           their task arithmetic
#   bash scripts/somf.sh --dry_run          print the commands, run nothing
#
# LIKELIHOOD=120: prompts of each set that refusals are scored on by likelihood, -1 for all of them.
# SEEDS="1 2 3 4 5" SAMPLES=-1 OUT=results/somf_whole bash scripts/somf.sh takes more mask seeds and whole test sets;
# ATTACKS="cot cou suffix prefill" ATTACK_SAMPLES=60 more attack wrappers and prompts under them, ATTACKS= none;
# PRESET=FILE.yaml UNALIGNED=MODEL another model (its name stands in the preset too).
# Every step is a command that you can run by itself; what is finished is not done again.
#
# The published preference score needs a judge that this script cannot count on; beside it stands an offline one
# (fitted-safer: it knows words only). With a key in OPENAI_API_KEY, on the answers made here, each against the base model's:
#   python evaluator/evaluate_safety.py --preset somf --output_dir results/somf --lite --num_samples 60 \
#     --task_name cross_aligned,cross_english,cross_somf_english_hard_1 --judges fitted-safer,api-safety-preference \
#     --judge_model gpt-4o-2024-08-06 --judge_prices 2.5,10 --max_cost 5
# (a local judge: --judges fitted-safer,safer=MODEL), then this script again: its report shows preference_score.
set -euo pipefail
cd "$(dirname "$0")/.."

words=("$@") task=english full=() dry='' name=somf
samples=${SAMPLES:-60} out=${OUT:-results/somf} preset=${PRESET:-somf} unaligned=${UNALIGNED:-embedded}
read -ra seeds <<<"${SEEDS:-1 2 3}"
read -ra readouts <<<"${READOUTS:-expected hard}"
read -ra attacks <<<"${ATTACKS-cot suffix}"
attack_samples=${ATTACK_SAMPLES:-30} likelihood=${LIKELIHOOD:-120}
for one in ${attacks[@]+"${attacks[@]}"}; do
  case $one in cot|cou|suffix|prefill) ;;
    *) echo "error: ATTACKS: no attack '$one'; allowed: cot, cou, suffix, prefill, or empty for none" >&2; exit 2 ;; esac
done
[[ $likelihood =~ ^(-1|[1-9][0-9]*)$ ]] || {
  echo "error: LIKELIHOOD $likelihood: a number of prompts of each set, or -1 for all" >&2; exit 2; }
[[ $attack_samples =~ ^(-1|[1-9][0-9]*)$ ]] || {
  echo "error: ATTACK_SAMPLES $attack_samples: a number of prompts, or -1 for all that were answered" >&2; exit 2; }
while [ $# -gt 0 ]; do
  case $1 in
    --task) case ${2:-} in english|chinese|maths|summaries) task=$2 ;;
              *) echo "error: --task ${2:-}: needs one of english, chinese, maths, summaries" >&2; exit 2 ;; esac; shift ;;
    --full) full=(maths summaries); name=somf_full ;;
    --dry_run) dry=yes ;;
    -h|--help) sed -n '2,22p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: $1: unknown; allowed: --task NAME, --full, --dry_run" >&2; exit 2 ;;
  esac
  shift
done
[ -n "$dry" ] || . scripts/environment.sh
export HF_HUB_OFFLINE=1

logs=$out/logs
. scripts/lanes.sh
warm ${words[@]+"${words[@]}"}
base=(--preset "$preset" --output_dir "$out")
on_aligned=("${base[@]}" --model_name_or_path "$out/outputs/aligned")

# once RUNS.. -- COMMAND: the command, unless the same words finished before and these runs are still what they were then;
# so a second run of this script takes seconds.
once() {
  local runs=()
  while [ "$1" != -- ]; do runs+=("$1"); shift; done
  shift
  printf '$'; printf ' %q' "$@"; printf '\n'
  [ -z "$dry" ] || return 0
  local stamp
  stamp=$logs/done/$(cksum <<<"$*" | tr ' ' _)
  [ "$(cat "$stamp" 2>/dev/null)" != "$(state "$*" "${runs[@]}")" ] || { echo "  done before"; return 0; }
  run "$@"
  mkdir -p "$logs/done"; state "$*" "${runs[@]}" >"$stamp"
}
state() { # WORDS RUNS..
  local run
  echo "$1"; { cksum <"scripts/presets/$preset.yaml" || cksum <"$preset"; } 2>/dev/null
  for run in "${@:2}"; do { cksum <"$out/outputs/$run/manifest.json"; } 2>/dev/null || echo missing; done
}

from=()
# $from: the runs that a result is made of, so that it is made again when one of them was
realign() { # NAME FLAGS..
  once "$1" aligned "${from[@]}" -- python models/fuse.py realign --run_name "$1" --out_dtype float16 "${@:2}" "${on_aligned[@]}" \
    --threads "$half"
}
low_rank() { # NAME FLAGS..: a result of low rank, but for what a checkpoint's rounding adds; what is cut off is printed
  once "$1" aligned "${from[@]}" -- python models/fuse.py realign --run_name "$1" --output adapter "${@:2}" "${on_aligned[@]}" \
    --threads "$half"
}
tuned() { # TASK
  once "$1" aligned -- python align_basemodel.py --moe_flag 0 --task_name "$1" "${on_aligned[@]}" --threads "$half"
}
masks() { # TASKS RULE SEEDS..: the masks of these seeds, each read out, each with its control at random places
  local tasks=$1 rule=$2 tag=${1//,/_} seed readout from
  for seed in "${@:3}"; do
    once "mask_${tag}_$seed" aligned ${tasks//,/ } -- python align_basemodel.py --method mask --tasks "$tasks" ${rule:+--merge_rule "$rule"} \
      --seed "$seed" --run_name "mask_${tag}_$seed" "${on_aligned[@]}" --threads "$half"
    from=("mask_${tag}_$seed")
    for readout in "${readouts[@]}"; do
      realign "somf_${tag}_${readout}_$seed" --method mask --mask "mask_${tag}_$seed" --readout "$readout" --seed "$seed"
      realign "random_${tag}_${readout}_$seed" --method random_mask --mask "mask_${tag}_$seed" --readout "$readout" \
        --seed "$seed"
    done
  done
}
controls() { # TASKS RULE..: what needs no mask
  local tag=${1//,/_} alpha rule=(--tasks "$1" ${2:+--rule "$2"}) from rank
  read -ra from <<<"${1//,/ }"
  rank=$((48 + 16 * ${#from[@]}))   # r 16 of each task, of the safety SFT and of the safety DPO, and 16 to spare
  for alpha in 25 50 75; do
    low_rank "wise_${tag}_$alpha" "${rule[@]}" --method wise_ft --parameters "alpha=0.$alpha"
  done
  realign "magnitude_$tag" "${rule[@]}" --method magnitude --parameters "kept=0.5"
  [ -n "${2:-}" ] || realign "dare_$tag" --tasks "$1" --method dare   # of several tasks it is a rule, which stands beside them
  low_rank "resta_$tag" "${rule[@]}" --method resta --parameters "gamma=0.5" --unaligned "$unaligned" --rank "$rank"
  low_rank "safe_lora_$tag" "${rule[@]}" --method safe_lora --parameters "tau=0.5; exact=true" --unaligned "$unaligned" \
    --rank "$rank"
}
dpo_control() { # as many pairs and steps as a mask has, on the tuned model's own adapter; its rate was not tuned on anything
  once dpo_lora "$task" -- python align_basemodel.py --moe_flag 0 --task_name safety --method dpo --init_adapter "$task" \
    --run_name dpo_lora --num_train_epochs 2 --learning_rate 1e-4 "${on_aligned[@]}" --threads "$half"
}
answers() { # RUNS MODEL_FLAGS..: what the judges read, the likelihood of refusals and of held-out task answers
  local runs=$1 folders; shift
  for set in safety overrefusal; do
    once ${runs//,/ } -- python inference.py --task_name "$set" --cross_task "$runs" --num_samples "$samples" "$@" \
      --threads "$half"
  done
  folders=cross_${runs//,/,cross_}; folders=${folders/cross_base/raw}
  once ${runs//,/ } -- python evaluator/evaluate_refusal.py --task_name "$folders" --num_samples "$likelihood" "$@" \
    --threads "$half"
  once ${runs//,/ } -- python evaluator/evaluate_skills.py --task_name "$folders" --skills "$(IFS=,; echo "${skills[*]}")" "$@" \
    --threads "$half"
  once ${runs//,/ } -- python evaluator/evaluate_safety.py --task_name "$folders" --num_samples "$samples" --lite \
    --judges fitted-safer "$@" --threads "$half"
}
attacked() { # RUNS ATTACKS..: the harmful prompts in attack wrappers
  local runs=$1 attack; shift
  for attack in "$@"; do
    once ${runs//,/ } -- python inference.py --task_name safety --attack "$attack" --cross_task "$runs" \
      --num_samples "$attack_samples" "${on_aligned[@]}" --threads "$half"
    # over-refusal is scored along with it: as many prompts as above, so that its number stays the same
    once ${runs//,/ } -- python evaluator/evaluate_safety.py --harmful_task "safety+$attack" --task_name "cross_${runs//,/,cross_}" \
      --num_samples "$samples" --lite "${on_aligned[@]}" --threads "$half"
  done
}
pictures() { # TASKS SEEDS..: where the masks of these seeds keep what, how far they agree, how the tasks overlap
  local tag=${1//,/_} runs=()
  for seed in "${@:2}"; do runs+=("mask_${tag}_$seed"); done
  once "${runs[@]}" -- python evaluator/mask_figures.py --masks "$(list "${runs[@]}")" --run_name "$tag" "${on_aligned[@]}" \
    --threads "$half"
}
list() { local IFS=,; echo "$*"; }
over_seeds() { # PREFIX: the runs of all mask seeds as one row
  local seed row=''
  for seed in "${seeds[@]}"; do row+=+$1_$seed; done
  echo "${row#+}"
}

skills=("$task")
for extra in ${full[@]+"${full[@]}"}; do [ "$extra" = "$task" ] || skills+=("$extra"); done

step "model and data"
once -- python -m data.assets fetch --lite

step "an aligned model: SFT on answers and refusals, then safety DPO, each written into the weights"
# refusals alone make a model that refuses everything; the published safety SFT also holds safe answers that help
once safety_sft -- python align_basemodel.py --moe_flag 0 --task_name mix --run_name safety_sft "${base[@]}"
once safety_model safety_sft -- python models/fuse.py realign --tasks safety_sft --run_name safety_model "${base[@]}"
once safety_dpo safety_model -- python align_basemodel.py --moe_flag 0 --task_name safety --method dpo --run_name safety_dpo "${base[@]}" \
  --model_name_or_path "$out/outputs/safety_model"
once aligned safety_dpo -- python models/fuse.py realign --tasks safety_dpo --run_name aligned "${base[@]}" \
  --model_name_or_path "$out/outputs/safety_model"

step "task SFT of the aligned model; the base's answers beside it"
beside first answers base "${base[@]}"
for one in "${skills[@]}"; do tuned "$one"; done
join

step "masks, and controls beside them: DPO at equal budget, WiSE-FT, magnitude, DARE, RESTA, Safe LoRA"
lane_one() { masks "$task" "" "${seeds[@]:0:(${#seeds[@]}+1)/2}"; }
lane_two() { dpo_control; controls "$task" ""; masks "$task" "" "${seeds[@]:(${#seeds[@]}+1)/2}"; }
beside masks lane_two
lane_one
join

multi=()
if [ ${#skills[@]} -gt 1 ]; then
  step "several tasks: merges alone, masks on them"
  joined=$(IFS=,; echo "${skills[*]}"); tag=${joined//,/_}
  from=("${skills[@]}")
  for rule in task_arithmetic ties dare average; do
    realign "merge_${rule}_$tag" --tasks "$joined" --rule "$rule"
    multi+=("merge_${rule}_$tag")
  done
  from=()
  lane_two() { controls "$joined" task_arithmetic; masks "$joined" task_arithmetic "${seeds[@]:(${#seeds[@]}+1)/2}"; }
  beside merged lane_two
  masks "$joined" task_arithmetic "${seeds[@]:0:(${#seeds[@]}+1)/2}"
  join
fi

step "answers and scores"
first=(aligned "$task" dpo_lora) second=()
of_controls() { # TAG: the runs that controls makes
  echo "wise_$1_25 wise_$1_50 wise_$1_75 magnitude_$1 resta_$1 safe_lora_$1"
}
for kind in "dare_$task" $(of_controls "$task"); do first+=("$kind"); done
for readout in "${readouts[@]}"; do
  for seed in "${seeds[@]}"; do second+=("somf_${task}_${readout}_$seed" "random_${task}_${readout}_$seed"); done
done
if [ ${#multi[@]} -gt 0 ]; then
  first+=("${multi[@]}" "${skills[@]:1}")
  for kind in $(of_controls "$tag"); do first+=("$kind"); done
  for readout in "${readouts[@]}"; do
    for seed in "${seeds[@]}"; do second+=("somf_${tag}_${readout}_$seed" "random_${tag}_${readout}_$seed"); done
  done
fi
beside answers answers "$(list "${second[@]}")" "${on_aligned[@]}"
answers "$(list "${first[@]}")" "${on_aligned[@]}"
pictures "$task" "${seeds[@]}"
if [ ${#multi[@]} -gt 0 ]; then pictures "$joined" "${seeds[@]}"; fi
join

last=${readouts[${#readouts[@]}-1]}
if [ ${#attacks[@]} -gt 0 ]; then
  step "attack wrappers: ${attacks[*]}"
  main=(aligned "$task" "wise_${task}_50" dpo_lora "resta_$task")
  for kind in "somf_${task}_$last" "random_${task}_$last"; do for seed in "${seeds[@]}"; do main+=("${kind}_$seed"); done; done
  half_of=$(((${#attacks[@]} + 1) / 2))
  if [ ${#attacks[@]} -gt 1 ]; then beside attacks attacked "$(list "${main[@]}")" "${attacks[@]:half_of}"; fi
  attacked "$(list "${main[@]}")" "${attacks[@]:0:half_of}"
  if [ ${#attacks[@]} -gt 1 ]; then join; fi
fi

step "report"
of_rows() { # TAG WORD: the controls as rows of the table
  local alpha
  printf '%s' ",RESTA$2=resta_$1,Safe LoRA$2=safe_lora_$1,magnitude mask$2=magnitude_$1"
  for alpha in 25 50 75; do printf '%s' ",WiSE-FT 0.$alpha$2=wise_$1_$alpha"; done
}
rows="base=base,aligned=aligned,$task SFT=$task,DPO-LoRA=dpo_lora,DARE=dare_$task$(of_rows "$task" '')"
if [ ${#multi[@]} -gt 0 ]; then
  for one in "${skills[@]:1}"; do rows+=",$one SFT=$one"; done
  for rule in task_arithmetic ties dare average; do rows+=",merge $rule=merge_${rule}_$tag"; done
  rows+=$(of_rows "$tag" ' (merged)')   # the magnitude mask cuts each task before they are summed
  for readout in "${readouts[@]}"; do
    rows+=",random mask $readout (merged)=$(over_seeds "random_${tag}_$readout")"
    rows+=",SOMF $readout (merged)=$(over_seeds "somf_${tag}_$readout")"
  done
fi
for readout in "${readouts[@]}"; do rows+=",random mask $readout=$(over_seeds "random_${task}_$readout")"; done
for readout in "${readouts[@]}"; do rows+=",SOMF $readout=$(over_seeds "somf_${task}_$readout")"; done
columns=refusal_auc,refusal_auc_plain,refusal_auc_edgy,refusal_auc_length,refusal_at_10,pairs_ranked,harm_rate,incoherent
report=(python evaluator/report.py --runs "$rows" --name "$name" --title "SOMF on $task" --base "$task" --experts aligned
        --control "$(over_seeds "random_${task}_$last"),wise_${task}_50" --columns "$columns" "${base[@]}")
say "${report[@]}"
if [ ${#attacks[@]} -gt 0 ]; then
  rows="aligned=aligned,$task SFT=$task,WiSE-FT 0.50=wise_${task}_50,DPO-LoRA=dpo_lora,RESTA=resta_$task"
  rows+=",random mask $last=$(over_seeds "random_${task}_$last"),SOMF $last=$(over_seeds "somf_${task}_$last")"
  report=(python evaluator/attack_table.py --runs "$rows" --attacks "$(list "${attacks[@]}")" --name "${name}_attacks" "${base[@]}")
  say "${report[@]}"
fi

step "the question: is the learned mask safer than a random one, and than WiSE-FT at equal utility?"
ask() { # TAG END READOUT SKILL NAME: masks of TAG against WiSE-FT's line, which leads from aligned to END, and against random
  local against line=aligned,wise_$1_25,wise_$1_50,wise_$1_75,$2 safety
  for against in "wise_ft $line" "random $(over_seeds "random_$1_$3")"; do
    # refusals of harmful prompts minus those of harmless ones; the former alone; whom it refuses, by likelihood
    for safety in balance refusal discrimination; do
      say python evaluator/equal_utility.py --subject "$(over_seeds "somf_$1_$3")" --line "${against#* }" --skill "$4" \
        --safety "$safety" --name "$5_against_${against%% *}_$safety" "${base[@]}"
    done
  done
}
for readout in "${readouts[@]}"; do ask "$task" "$task" "$readout" "$task" "${name}_$readout"; done
if [ ${#multi[@]} -gt 0 ]; then
  for skill in "${skills[@]}"; do ask "$tag" "merge_task_arithmetic_$tag" "$last" "$skill" "${name}_merged_${last}_$skill"; done
fi
printf '\nDone in %d s. Report: %s\n' $((SECONDS - start)) "$out/report/$name.md"
