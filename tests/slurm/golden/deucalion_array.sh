#!/bin/bash -l

# Parameters
#SBATCH --account=project42
#SBATCH --array=0-299%8
#SBATCH --chdir=/project
#SBATCH --comment=amalia-vl:/project/runs/first
#SBATCH --cpus-per-task=32
#SBATCH --gres=gpu:1
#SBATCH --job-name=first.commands.001
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=121G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/project/runs/first/arrays/commands/001/log_%a.out
#SBATCH --partition=normal-a100-80
#SBATCH --requeue
#SBATCH --signal=USR2@60
#SBATCH --time=120

# setup
# array 1 of /project/runs/first
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
/project/env/bin/python -m slurm.array_element /project/runs/first/arrays/commands/001
