#!/usr/bin/env bash
# A real SLURM of one node on this machine, everything below one folder: to try what will run on a cluster, and for the tests.
#
#   apt-get install slurm-wlm munge                  (Debian, Ubuntu; once)
#   eval "$(bash scripts/slurm_node.sh start FOLDER)"    starts munged, slurmctld, slurmd; sets SLURM_CONF and PATH, with which
#                                                    sinfo, squeue, sbatch and --executor slurm find it
#   bash scripts/slurm_node.sh restart FOLDER        ends the controller and starts it anew; jobs run on
#   bash scripts/slurm_node.sh stop FOLDER           ends the jobs' daemons by their pid files
#
# CPUS=2 MEMORY_MB=8000 bash ...: what it thinks the node has. No user, service or file outside FOLDER is touched. SLURM's ports
# are drawn from the folder's name, so that two of them may run beside each other.
set -euo pipefail
[ $# -eq 2 ] || { sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; exit 2; }
# Debian puts the daemons where only root's PATH looks
PATH=$PATH:/usr/sbin:/sbin
mkdir -p "$2"
folder=$(cd "$2" && pwd)
export SLURM_CONF=$folder/slurm.conf

alive() { [ -s "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null; }

ended() {
  if alive "$1"; then
    pid=$(cat "$folder/$1.pid")
    kill "$pid"
    for _ in $(seq 300); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    ! kill -0 "$pid" 2>/dev/null || kill -9 "$pid"
  fi
  rm -f "$folder/$1.pid"
}

controller() {
  slurmctld
  # a controller that was just started answers after a moment
  for _ in $(seq 600); do ! scontrol ping 2>/dev/null | grep -q 'UP' || return 0; sleep 0.1; done
  echo "error: slurmctld does not answer; its log: $folder/slurmctld.log" >&2; exit 1
}

case $1 in
  start)
    for tool in munged slurmctld slurmd; do
      command -v "$tool" >/dev/null || { echo "error: $tool is not here: apt-get install slurm-wlm munge" >&2; exit 2; }
    done
    umask 022
    mkdir -p "$folder/state" "$folder/spool" "$folder/bin"
    # snakemake's executor takes SLURM_CONF, as all of SLURM's variables, away from the srun inside a job
    # the program, and not such a script of another node whose shell this is
    srun=$(type -aP srun | while read -r at; do head -c 2 "$at" | grep -q '#!' || { echo "$at"; break; }; done)
    printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' "$SLURM_CONF" "$srun" >"$folder/bin/srun"
    chmod +x "$folder/bin/srun"
    [ -s "$folder/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$folder/munge.key")
    port=$((20000 + $(printf %s "$folder" | cksum | cut -d' ' -f1) % 5000 * 2))
    host=$(hostname -s)
    # nproc alone would tell the threads of OMP_NUM_THREADS
    cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
# seconds that squeue remembers a job that ended: snakemake asks it, where no sacct database is
MinJobAge=600
# looked at often; a requeued job waits two minutes all the same, SLURM's own
SchedulerParameters=sched_interval=2,requeue_setup_env_fail
NodeName=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-$(env -u OMP_NUM_THREADS nproc)} RealMemory=${MEMORY_MB:-8000} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    # --force: the folder may lie below one that others may write to
    alive munged || munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" \
      --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    alive slurmctld || controller
    alive slurmd || slurmd -N "$host"
    for _ in $(seq 600); do
      [ "$(sinfo --noheader --format=%t 2>/dev/null)" != idle ] || {
        printf 'export SLURM_CONF=%q PATH=%q:$PATH\n' "$SLURM_CONF" "$folder/bin"; exit 0; }
      sleep 0.1
    done
    echo "error: the node does not become idle; logs: $folder/*.log" >&2; exit 1 ;;
  restart) ended slurmctld; controller ;;
  stop) ended slurmctld; ended slurmd; ended munged ;;
  *) echo "error: $1: allowed: start, restart, stop" >&2; exit 2 ;;
esac
