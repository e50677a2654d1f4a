#!/usr/bin/env bash
# Several machines under Slurm: sbatch examples/slurm.sh MODEL DATA OUTPUT
# Slurm starts one torchrun a machine, which starts one process a GPU.
#SBATCH --job-name=qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
model=$1 data=$2 output=$3

# A job that Slurm starts again goes on from its last checkpoint.
resume=()
if compgen -G "$output/checkpoint-*/trainer_state.json" > /dev/null; then
    resume=(--resume)
fi

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first:29500" \
    --no-python \
    qlora-compile train --model "$model" --data "$data" --output "$output" "${resume[@]}"
