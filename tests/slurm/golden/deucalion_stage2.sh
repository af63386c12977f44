#!/bin/bash -l

# Parameters
#SBATCH --account=project42
#SBATCH --chdir=/project
#SBATCH --comment=amalia-vl:/project/runs/first
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --gres=gpu:4
#SBATCH --job-name=first.stage2.001
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=0
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/project/runs/first/stage2/segments/001/log.out
#SBATCH --partition=normal-a100-80
#SBATCH --requeue
#SBATCH --signal=USR2@600
#SBATCH --time=1440

# setup
# segment 1 of /project/runs/first, stage2
# begins when first.stage1.verify.001 has succeeded
unset PYTHONHOME  # set by some modules for another Python
export PYTHONPATH=/project/runs/first/code
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=8
export MKL_NUM_THREADS=8
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
export HF_DATASETS_OFFLINE=1
export HF_HUB_DISABLE_TELEMETRY=1
export CUDA_DEVICE_MAX_CONNECTIONS=1

# command
export SUBMITIT_EXECUTOR=slurm
# Where the ranks meet: this node, as a number, for its name may mean loopback.
host=${SLURMD_NODENAME:-$(hostname)}
MASTER_ADDR=
if [ -z "$MASTER_ADDR" ]; then
  MASTER_ADDR=$(getent ahostsv4 "$host" | awk 'NR == 1 { print $1 }')
fi
case "$MASTER_ADDR" in "" | 127.*)
  address=$(scontrol show node "$host" 2>/dev/null |
    sed -n 's/.*NodeAddr=\([0-9][0-9.]*\) .*/\1/p')
  [ -n "$address" ] || address=$(hostname -I | cut -d ' ' -f 1)
  MASTER_ADDR=${address:-$MASTER_ADDR} ;;
esac
export MASTER_ADDR=${MASTER_ADDR:-$host}

# The ranks save and stop 10 minutes before the job's end, counted by the
# uptime of this node, which no change of its clock moves.
uptime_seconds() { cut -d. -f1 /proc/uptime; }
left=$(( ${SLURM_JOB_END_TIME:-0} - $(date +%s) ))
if [ "$left" -le 0 ] || [ "$left" -gt 86400 ]; then left=86400; fi
stop_at=$(( $(uptime_seconds) + left - 600 ))

# Slurm's signals go to the ranks, which save and end. This shell only remembers that it was asked
# to end, so as not to start them again.
terminated=
trap 'terminated=--terminated' TERM USR2

attempt=0
while :; do
  attempt=$((attempt + 1))
  export ATTEMPT_ID="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$attempt-$(date +%s)"
  block=$(( SLURM_JOB_ID % 1500 * 10 ))
  # Another one after a requeue: what was left behind on the node may still hold the old one.
  try=$(( attempt + 3 * ${SLURM_RESTART_COUNT:-0} ))
  export MASTER_PORT=$(( 15000 + block + try % 10 ))

  # May and must this segment train? 3: the stage is done.
  /project/env/bin/python -m slurm.segment begin /project/runs/first/stage2 /project/runs/first/stage2/segments/001
  code=$?
  if [ "$code" -eq 3 ]; then exit 0; fi
  if [ "$code" -ne 0 ]; then exit "$code"; fi

  srun --nodes=4 --ntasks=16 --ntasks-per-node=4 --cpus-per-task=32 --kill-on-bad-exit=1 --unbuffered --label --mpi=none --cpu-bind=none --gpu-bind=none --wait=60 \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[!0-9]*}; trap : TERM INT USR1 USR2; "$@"; code=$?; case $code in 130 | 138 | 140 | 143) exit 0 ;; esac; exit $code' rank \
    /project/env/bin/python -m pipeline.preflight --config /project/runs/first/stage2/config.yaml --report /project/runs/first/stage2/segments/001/preflight
  code=$?
  if [ -n "$terminated" ] && [ "$code" -eq 0 ]; then code=143; fi
  if [ "$code" -eq 0 ]; then
    seconds=$(( stop_at - $(uptime_seconds) ))
    export STOP_AFTER_SECONDS=$(( seconds > 1 ? seconds : 1 ))
    srun --nodes=4 --ntasks=16 --ntasks-per-node=4 --cpus-per-task=32 --kill-on-bad-exit=1 --unbuffered --label --mpi=none --cpu-bind=none --gpu-bind=none --wait=60 \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[!0-9]*}; trap : TERM INT USR1 USR2; "$@"; code=$?; case $code in 130 | 138 | 140 | 143) exit 0 ;; esac; exit $code' rank \
    /project/env/bin/python -m pipeline.train --config /project/runs/first/stage2/config.yaml
    code=$?
    # Ranks that were asked to stop return 0, but have not finished.
    if [ "$code" -eq 0 ] && [ ! -e /project/runs/first/stage2/DONE.json ]; then code=143; fi
  fi

  # Says what comes next. 75: the ranks once more, here.
  /project/env/bin/python -m slurm.segment end /project/runs/first/stage2 /project/runs/first/stage2/segments/001 --code "$code" $terminated
  code=$?
  if [ "$code" -ne 75 ]; then exit "$code"; fi
done
