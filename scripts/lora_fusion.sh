#!/usr/bin/env bash
# The LoRA fusion study on the embedded default: an aligned model, adapters that cost its safety (an identity shift; benign maths
# and summaries), a safety adapter, the sweep over the fusion weight with refinement, every control, tables and Pareto pictures.
#
#   bash scripts/lora_fusion.sh             one seed
#   bash scripts/lora_fusion.sh --full      three seeds (42, 43, 44) and their common report
#   bash scripts/lora_fusion.sh --seed 7    another seed, in results/lora_fusion/seed_7
#   bash scripts/lora_fusion.sh --dry_run   print the commands, run nothing
#
# SAMPLES=-1 OUT=results/lora_whole bash scripts/lora_fusion.sh takes whole test sets; REFINE=8 and STEP=0.005 look closer at the
# cliff; STEPS=2 cuts every training after two steps (a smoke test); MODEL=FOLDER takes another base than the embedded one,
# WINDOW=N its tokens per benign row; ANSWERS=0 leaves numeric match and ROUGE of generated answers out.
# ALIGN=q_proj,v_proj,gate_proj,up_proj,down_proj aligns the base in these modules instead of the FFN alone (with another OUT):
# Safe LoRA and SafeMERGE project onto what alignment changed, and the adapters here train q and v.
# Half of the safety set are contrasts, harmful requests refused beside harmless ones answered; CONTRASTS=0 is the old set.
# PROMPTS=N prompts of every set for refusal by likelihood, which every row is scored by (-1: all; 0: none).
# Every step is a command that you can run by itself; what is finished is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."

words=("$@") seeds=(42) dry='' samples=${SAMPLES:-32} root=${OUT:-results/lora_fusion} unaligned=${MODEL:-embedded}
while [ $# -gt 0 ]; do
  case $1 in
    --full) seeds=(42 43 44) ;;
    --seed) case ${2:-} in *[!0-9]*|'') echo "error: --seed ${2:-}: needs a whole number, 0 or more" >&2; exit 2 ;; esac
            seeds=("$2"); shift ;;
    --dry_run) dry=yes ;;
    -h|--help) sed -n '2,17p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: $1: unknown; allowed: --full, --seed N, --dry_run" >&2; exit 2 ;;
  esac
  shift
done
[ -n "$dry" ] || . scripts/environment.sh
export HF_HUB_OFFLINE=1

. scripts/lanes.sh
warm ${words[@]+"${words[@]}"}

short=(${STEPS:+--max_steps "$STEPS"})
# the paper's adapter, smaller: q and v, r 8, alpha 32, dropout 0.05, learning rate 1e-3 times 0.85 an epoch, batch 4
lora=(--lora_targets q_proj,v_proj --lora_r 8 --lora_alpha 32 --lora_dropout 0.05 --learning_rate 1e-3 --lr_epoch_decay 0.85
      --per_device_train_batch_size 4 --gradient_accumulation_steps 1 --warmup_steps 0)

aligned() { # the base model of everything below: the embedded one answers harmful prompts, the paper's does not
  # the preset's joint training: it learns whom to refuse. Nothing runs beside it, so it has all cores
  say python align_basemodel.py --moe_flag 0 --task_name mix --run_name aligned_lora ${ALIGN:+--lora_targets "$ALIGN"} \
    --model_name_or_path "$unaligned" "${alone[@]}" "${short[@]}"
  say python models/fuse.py realign --tasks aligned_lora --run_name aligned --model_name_or_path "$unaligned" "${common[@]}"
}
adapter() { # NAME FLAGS..
  say python align_basemodel.py --moe_flag 0 --run_name "$1" "${@:2}" "${on_aligned[@]}" "${lora[@]}" "${short[@]}"
}
identity() { adapter identity --task_name identity --num_train_epochs 6; }
safe() { adapter safe --task_name dialogs --data_path "$set" --num_train_epochs 4; }
joint() { adapter joint --task_name identity --extra_data "$set" --num_train_epochs 6; }
little=(--extra_share 0.03 --extra_min_rows 8)   # 3 % of 35 rows are one, and which one it is would decide
mixed() { adapter mix3 --task_name identity --extra_data "$set" "${little[@]}" --num_train_epochs 6; }
then_safe() { # order of training: the safety data after the task, on the task's own adapter
  say python align_basemodel.py --moe_flag 0 --run_name task_then_safe --task_name dialogs --data_path "$set" \
    --init_adapter identity --num_train_epochs 4 "${on_aligned[@]}" "${after[@]}" "${short[@]}"
}
then_task() {
  say python align_basemodel.py --moe_flag 0 --run_name safe_then_task --task_name identity --init_adapter safe \
    --num_train_epochs 6 "${on_aligned[@]}" "${after[@]}" "${short[@]}"
}
benign() { # TASK ROWS; an article alone takes about 230 tokens
  local rows=(--task_name "$1" --max_train_samples "$2" --num_train_epochs 2 --model_max_length "${WINDOW:-320}")
  adapter "$1" "${rows[@]}"
  adapter "$1_mix3" "${rows[@]}" --extra_data "$set" "${little[@]}"
}
realigned() { # NAME FLAGS..: training-free repairs of the identity adapter, from the safety vector aligned - unaligned
  say python models/fuse.py realign --tasks identity --run_name "$1" --unaligned "$unaligned" --output adapter --rank 64 \
    "${@:2}" "${on_aligned[@]}"
}
second_lane() { benign maths 160; benign summaries 64; then_safe; }
sweep() { # NAME FLAGS..
  say python scripts/sweep.py --name "$1" --safety safe --num_samples "$samples" --refine "${REFINE:-3}" \
    --min_step "${STEP:-0.0125}" "${@:2}" "${on_aligned[@]}"
}
answered=(--utility_answers "${ANSWERS:-24}")   # numeric match and ROUGE beside the likelihood
told=(--discrimination "${PROMPTS:-80}")         # one number for all sweeps: rows that they share are scored once
sweep_benign() {
  sweep maths --task maths --utility maths "${answered[@]}" "${told[@]}" --controls "aligned model=base,$few_rows=maths_mix3"
  sweep summaries --task summaries --utility summaries "${answered[@]}" "${told[@]}" \
    --controls "aligned model=base,$few_rows=summaries_mix3"
}
other_lane() { # the benign sweeps, and so many of the identity shift's rows that both lanes take as long
  local few=(--task identity --refine 0 --shrink false --reverse false)
  sweep identity_none --prompt_styles none "${few[@]}" --controls "$by_training"   # before the first lane comes to them
  sweep_benign
  sweep identity_valet --prompt_styles valet "${few[@]}" --controls "$by_training,$without"
}

# Safe LoRA and SafeMERGE equal the task adapter where alignment left its modules alone, which the report should say
untouched=' (alignment left q and v alone)'
case ,${ALIGN:-}, in *,q_proj,*|*,v_proj,*) untouched='' ;; esac
few_rows='3 % mixing (8 rows at least)'
by_training="aligned model=base,joint training=joint,$few_rows=mix3,task then safety=task_then_safe"
by_training+=",safety then task=safe_then_task"
without="norm-matched=matched,RESTA=resta,Safe LoRA$untouched=safe_lora,SafeMERGE$untouched=safe_merge"
every="$by_training,$without,learned weights=soup,searched weights=searched"
on_identity=(--task identity --random random_safe "${told[@]}")
roots=()
for seed in "${seeds[@]}"; do
  out=$root; [ "$seed" = 42 ] || out=$root/seed_$seed; logs=$out/logs
  roots+=("$out")
  common=(--preset embedded --seed "$seed" --output_dir "$out")
  alone=("${common[@]}" --threads "$cores"); common+=(--threads "$half")
  on_aligned=(--model_name_or_path "$out/outputs/aligned" "${common[@]}")
  after=("${lora[@]:2}")   # an adapter that is gone on with has its own rank and modules
  set=$out/data/safety_set.jsonl
  step "safety set: clean of every test set, half of it in the persona (seed $seed)"
  say python -m data.safety_sets --size 60 --hard 0.4 --soft 0.4 --styles none,orbit --contrast_share "${CONTRASTS:-0.5}" \
    "${common[@]}"
  step "an aligned model (seed $seed)"
  aligned
  step "task and safety adapters, and the trained controls (seed $seed)"
  identity
  beside "adapters_$seed" second_lane
  safe; joint; mixed; then_task
  join
  say python models/fuse.py adapters --adapters safe --method random --report false --run_name random_safe "${common[@]}"
  say python models/fuse.py adapters --adapters identity,safe --share 0.4 --match_norms module --run_name matched "${common[@]}"
  say python models/fuse.py adapters --adapters identity,safe --share 0.4 --run_name fused "${common[@]}"
  realigned resta --method resta --parameters "gamma=0.5"
  realigned safe_lora --method safe_lora --parameters "tau=0.5; exact=true"
  realigned safe_merge --method safe_merge --parameters "tau=0.5; alpha=0.5" --safe safe
  step "sweeps of the benign adapters; beside them learned and searched weights of the identity shift (seed $seed)"
  beside "benign_$seed" other_lane
  say python align_basemodel.py --moe_flag 0 --run_name soup --method soup --adapters identity,safe --task_name identity \
    --extra_data "$set" --num_train_epochs 1 --learning_rate 0.05 "${on_aligned[@]}" "${short[@]}"
  say python align_basemodel.py --moe_flag 0 --run_name searched --method search --adapters identity,safe --task_name identity \
    --extra_data "$set" --max_train_samples 16 "${on_aligned[@]}"
  step "the identity shift's sweep, with refinement and controls (seed $seed)"
  sweep identity "${on_identity[@]}" --prompt_styles orbit,none --controls "$every"
  join
  step "what rows neither lane had, and the report (seed $seed)"
  sweep identity "${on_identity[@]}" --prompt_styles orbit,none,valet --controls "$every"
done
if [ "${#seeds[@]}" -gt 1 ]; then
  step "all seeds"
  for name in identity maths summaries; do
    say python scripts/sweep.py --roots "$(IFS=,; echo "${roots[*]}")" --name $name --output_dir "$root"
  done
fi
printf '\nDone in %d s. Reports and pictures: %s\n' $((SECONDS - start)) "$root/report/{identity,maths,summaries}.{md,png}"
