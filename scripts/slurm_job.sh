#!/usr/bin/env bash
# One command as a SLURM job that stops behind a checkpoint before its time is up and goes back into the queue.
#
#   sbatch --gpus=8 --time=04:00:00 scripts/slurm_job.sh accelerate launch .. align_basemodel.py .. --save_on_signal
#
# sbatch's own words (memory, account, partition) stand before this file. SLURM's --requeue alone is for nodes that fail and for
# preemption: a job whose time is up just ends. A command that fails by itself is not queued again.
#SBATCH --requeue --open-mode=append
# seconds before the time is up: a step and a save must fit in
#SBATCH --signal=B:TERM@300
[ $# -gt 0 ] && [ -n "${SLURM_JOB_ID:-}" ] || { sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
# accelerate launch and torchrun wait so long for their processes before they kill them; torch's own is 30 s
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}
told=
# to the processes of the command; srun, told itself, would kill them
trap 'told=1; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
code=0
srun "$@" &
wait $! || code=$?
if [ -n "$told" ]; then
  # the first wait ended with the signal
  wait
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
