#!/usr/bin/env bash
# What a GPU makes of this repository, as one table in less than ten minutes: the tests that compute on it, the races, a step
# of every training and of generation at Llama-2-7B shapes with random weights. Nothing is fetched.
#
#   bash scripts/gpu_check.sh                            one GPU with 80 GB
#   bash scripts/gpu_check.sh --device cpu --shape pico  all of it small, without a GPU
#   bash scripts/gpu_check.sh --out FOLDER               where table, JSON and logs go (results/gpu_check)
#   bash scripts/gpu_check.sh --only tests,steps         some of: tests processes steps race_moe race_generate race_mask
#                                                        race_static
#   bash scripts/gpu_check.sh --seconds 540              time for all of them (590)
#   bash scripts/gpu_check.sh --no_install               with the python that is first on the PATH, instead of .venv
#
# Each check has a time limit of its own, and none begins that is not left enough of --seconds. One that fails is a line
# "failed: why", with the end of its log behind the table; the others go on, and the exit code is 1 at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda shape=7b out=results/gpu_check install=yes total=590
all=tests,processes,steps,race_moe,race_generate,race_mask,race_static
only=$all
usage="--device cuda or cpu, --shape 7b or pico, --out FOLDER, --only CHECK,CHECK, --seconds N, --no_install"
while [ $# -gt 0 ]; do
  case $1 in
    --device) case ${2:-} in cuda|cpu) device=$2 ;;
                *) echo "error: --device ${2:-}: needs cuda or cpu" >&2; exit 2 ;; esac; shift ;;
    --shape) case ${2:-} in 7b|pico) shape=$2 ;;
               *) echo "error: --shape ${2:-}: needs 7b or pico" >&2; exit 2 ;; esac; shift ;;
    --out) [ -n "${2:-}" ] || { echo "error: --out: name a folder" >&2; exit 2; }; out=$2; shift ;;
    --only) only=${2:-}
            for one in ${only//,/ }; do
              [[ ,$all, = *,$one,* ]] || { echo "error: --only $one: no check; allowed: $all" >&2; exit 2; }
            done
            [ -n "${only//,/}" ] || { echo "error: --only: names no check; allowed: $all" >&2; exit 2; }; shift ;;
    --seconds) [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "error: --seconds ${2:-}: needs a number" >&2; exit 2; }
               total=$2; shift ;;
    --no_install) install='' ;;
    -h|--help) sed -n '2,14p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: $1: unknown; allowed: $usage" >&2; exit 2 ;;
  esac
  shift
done
[ -z "$install" ] || . scripts/environment.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# kernels are compiled; tests/conftest.py asks for the interpreter itself where it is not said and it sees no GPU
if [ "$device" = cuda ]; then export TRITON_INTERPRET=0; else unset TRITON_INTERPRET; fi
if [ "$device" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch sees no GPU here; run this where one is, or all of it small with --device cpu --shape pico" >&2
  exit 2
fi

mkdir -p "$out"
rm -f "$out"/{tests,processes,steps,race_moe,race_generate,race_mask,race_static}.{log,json} "$out"/gpu_check.{json,md}
: >"$out/ended.tsv"
# a processor takes longer, and its figures are nobody's
times=1 for_table=5
[ "$device" = cuda ] || times=8
# check NAME SECONDS COMMAND..: its output to NAME.log; how it ended is a line of ended.tsv. @limit in the command becomes a
# little less than the seconds it is given: it ends by itself and tells what it has
check() {
  local name=$1 limit=$(($2 * times)) code=0 start=$SECONDS left; shift 2
  [[ ,$only, = *,$name,* ]] || return 0
  left=$((total * times - SECONDS - for_table))
  # most take half of their limit; what is cut off far below has measured nothing
  if [ "$left" -lt $((limit / 3)) ]; then
    printf '%s\t-\t%s\t%s\n' "$name" "$limit" "$((left > 0 ? left : 0))" >>"$out/ended.tsv"
    return 0
  fi
  [ "$left" -ge "$limit" ] || limit=$left
  printf '== [%4d s] %s\n' "$SECONDS" "$name"
  timeout --kill-after=3 "$limit" "${@//@limit/$((limit - 4))}" >"$out/$name.log" 2>&1 || code=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) "$limit" >>"$out/ended.tsv"
}

tests=() moe=() mask=(--modes lora --pairs 2 --steps 4) part=50
# one row at a time takes as long as 32: of each size one batch
generate=(--shape 7b --pairs 2 --most 1) compiled=(--batches 1)
if [ "$shape" = pico ]; then
  # one test of the kernels, one row of each race
  tests=(--processes 1 -k same_bits) moe=(--hidden 64 --width 96 --tokens 4 --pairs 1 --dtype float32) part=300
  mask=(--modes lora --pairs 1 --steps 1 --layers 1 --batch 1 --tokens 16)
  generate=(--shape embedded --pairs 1 --prompts 2 --new 4) compiled=(--batches 2)
fi
suites() {
  check tests 90 python -m benchmarks.gpu_check.suite "${tests[@]+"${tests[@]}"}" --limit_s @limit --json "$out/tests.json" &
  # neither of the two measures time: side by side where there are cores for both
  [ "$(nproc)" -gt 4 ] || wait
  check processes 75 python -m benchmarks.gpu_check.processes --device "$device" --limit_s @limit \
    --json "$out/processes.json" &
  wait
}
suites
check steps 270 python -m benchmarks.gpu_check.steps --device "$device" --shape "$shape" --limit_s "$part" --total_s @limit \
  --json "$out/steps.json"
check race_moe 60 python benchmarks/moe.py --device "$device" "${moe[@]+"${moe[@]}"}" --json "$out/race_moe.json"
check race_generate 75 python benchmarks/generate.py --device "$device" "${generate[@]}" \
  --sides hf,continuous,generate_batch --json "$out/race_generate.json"
check race_mask 60 python benchmarks/mask.py --device "$device" "${mask[@]}" --json "$out/race_mask.json"
# what compiles comes last, and gets what time is left
check race_static 120 python benchmarks/generate.py --device "$device" "${generate[@]}" "${compiled[@]}" --sides hf,static \
  --json "$out/race_static.json"
python -m benchmarks.gpu_check.table "$out"
