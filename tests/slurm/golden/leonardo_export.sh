#!/bin/bash

# Parameters
#SBATCH --account=project42
#SBATCH --chdir=/project
#SBATCH --comment=amalia-vl:/project/runs/first
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --gres=gpu:4
#SBATCH --job-name=first.export.001
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=0
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/project/runs/first/export/001/log.out
#SBATCH --partition=boost_usr_prod
#SBATCH --requeue
#SBATCH --signal=USR2@60
#SBATCH --time=120

# setup
# export 1 of /project/runs/first, stage3
# begins when first.stage3.verify.001 has succeeded
unset PYTHONHOME  # set by some modules for another Python
export PYTHONPATH=/project/runs/first/code
export PYTHONSAFEPATH=1
export PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=4
export MKL_NUM_THREADS=4
export TOKENIZERS_PARALLELISM=false
export HF_HUB_OFFLINE=1
export TRANSFORMERS_OFFLINE=1
export HF_DATASETS_OFFLINE=1
export HF_HUB_DISABLE_TELEMETRY=1
export CUDA_DEVICE_MAX_CONNECTIONS=1

# command
export SUBMITIT_EXECUTOR=slurm
if [ -e /project/runs/first/hf ]; then echo /project/runs/first/hf is there already; exit 0; fi
/project/env/bin/python -m tools.hf_export stage=/project/runs/first/stage3 out=/project/runs/first/hf tokenizer=runs/first/import/tokenizer
