#!/usr/bin/env bash
# Faults upon every command, with pico models: SIGKILL at random moments, full disks, file size limits, read-only folders, two
# commands at once, clocks that jump, memory that runs out. Behind each fault nothing half-done may look done, and the same
# command again must end with the bytes of a calm run. Prints a table; exit code 1 where a rule was broken.
#
#   bash scripts/faults.sh                        100 kills and the other faults on every command
#   bash scripts/faults.sh --write                the same; the table goes into docs/reliability.md
#   bash scripts/faults.sh --kills 10             fewer kills: one of each command at least
#   bash scripts/faults.sh --only "train: sft,graph" --seed 3 --folder faults_here
set -euo pipefail
cd "$(dirname "$0")/.."
case " $* " in *" -h "*|*" --help "*) sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;; esac
. scripts/environment.sh
# one thread in each: a fork of a process with threads hangs, and the bytes are those of one thread
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=$PWD:$PWD/tests
exec python -m faults "$@"
