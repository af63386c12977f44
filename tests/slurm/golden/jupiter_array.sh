#!/bin/bash -l

# Parameters
#SBATCH --account=project42
#SBATCH --array=0-299%8
#SBATCH --chdir=/project
#SBATCH --comment=amalia-vl:/project/runs/first
#SBATCH --cpus-per-task=16
#SBATCH --job-name=first.commands.001
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/project/runs/first/arrays/commands/001/log_%a.out
#SBATCH --partition=booster
#SBATCH --requeue
#SBATCH --signal=USR2@60
#SBATCH --time=120

# setup
# array 1 of /project/runs/first
unset PYTHONHOME  # set by some modules for another Python
export PYTHONPATH=/project/runs/first/code
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=16
export MKL_NUM_THREADS=16
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
export HF_DATASETS_OFFLINE=1
export HF_HUB_DISABLE_TELEMETRY=1
export CUDA_DEVICE_MAX_CONNECTIONS=1
export NCCL_SOCKET_IFNAME=ib0
export NCCL_SOCKET_FAMILY=AF_INET
export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
export NCCL_IB_TIMEOUT=18
export NCCL_IB_RETRY_CNT=20
export GLOO_SOCKET_FAMILY=AF_INET
export GLOO_SOCKET_IFNAME=ib0

# command
export SUBMITIT_EXECUTOR=slurm
/project/env/bin/python -m slurm.array_element /project/runs/first/arrays/commands/001
