#!/usr/bin/env bash
# What a GPU makes of this repository, as one table in less than ten minutes: the tests that compute on it, the races, a step
# of every training and of generation at Llama-2-7B shapes with random weights. Nothing is fetched.
#
#   bash scripts/gpu_check.sh                            one GPU with 80 GB
#   bash scripts/gpu_check.sh --device cpu --shape pico  all of it small, without a GPU
#   bash scripts/gpu_check.sh --out FOLDER               where table, JSON and logs go (results/gpu_check)
#   bash scripts/gpu_check.sh --only tests,steps         some of: tests race_moe race_mask race_generate steps
#   bash scripts/gpu_check.sh --no_install               with the python that is first on the PATH, instead of .venv
#
# Each check has a time limit, all of them together 590 s. One that fails is a line "failed: why"; the others go on, and the
# exit code is 1 at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

device=cuda shape=7b out=results/gpu_check install=yes all=tests,race_moe,race_mask,race_generate,steps
only=$all
usage="--device cuda or cpu, --shape 7b or pico, --out FOLDER, --only CHECK,CHECK, --no_install"
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
    --no_install) install='' ;;
    -h|--help) sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "error: $1: unknown; allowed: $usage" >&2; exit 2 ;;
  esac
  shift
done
[ -z "$install" ] || . scripts/environment.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# kernels are compiled; tests/conftest.py asks for the interpreter itself where there is no GPU
unset TRITON_INTERPRET
if [ "$device" = cuda ] && ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "error: torch sees no GPU here; run this where one is, or all of it small with --device cpu --shape pico" >&2
  exit 2
fi

mkdir -p "$out"
rm -f "$out"/{tests,race_moe,race_mask,race_generate,steps}.{log,json} "$out"/gpu_check.{json,md}
: >"$out/ended.tsv"
# check NAME SECONDS COMMAND..: its output to NAME.log; how it ended is a line of ended.tsv
check() {
  local name=$1 limit=$2 code=0 start=$SECONDS; shift 2
  [[ ,$only, = *,$name,* ]] || return 0
  # a processor takes longer, and its figures are nobody's
  [ "$device" = cuda ] || limit=$((limit * 8))
  printf '== [%4d s] %s\n' "$SECONDS" "$name"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" $((SECONDS - start)) "$limit" >>"$out/ended.tsv"
}

tests=(-m cuda) moe=() mask=(--modes lora --pairs 2 --steps 4) part=45
if [ "$shape" = pico ]; then
  # one test of the kernels, one row of each race
  tests+=(-k same_bits) moe=(--hidden 64 --width 96 --tokens 4 --pairs 1 --dtype float32) part=300
  mask=(--modes lora --pairs 1 --steps 1 --layers 1 --batch 1 --tokens 16)
fi
mapfile -t marked < <(grep -rlE 'mark\.cuda' tests --include='*.py')
check tests 75 python -m pytest -q -p no:cacheprovider "${tests[@]}" "${marked[@]}"
check race_moe 75 python benchmarks/moe.py --device "$device" "${moe[@]+"${moe[@]}"}" --json "$out/race_moe.json"
check race_mask 75 python benchmarks/mask.py --device "$device" "${mask[@]}" --json "$out/race_mask.json"
if [ -f benchmarks/generate.py ]; then
  check race_generate 75 python benchmarks/generate.py --device "$device" --shape "$shape" --json "$out/race_generate.json"
fi
check steps 290 python -m benchmarks.gpu_check.steps --device "$device" --shape "$shape" --limit_s "$part" \
  --json "$out/steps.json"
python -m benchmarks.gpu_check.table "$out"
