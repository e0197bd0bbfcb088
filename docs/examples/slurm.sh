#!/usr/bin/env bash
# Two machines with 8 GPUs each: sbatch docs/examples/slurm.sh
#SBATCH --job-name=distilpeft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# Ten minutes before the end, a signal: a checkpoint is made, and the same job goes on from it.
#SBATCH --signal=TERM@600
#SBATCH --requeue
set -euo pipefail

RECIPE=recipes/ultrachat_qwen7b_to_qwen0.5b.yaml
RUNS=${RUNS:?a folder that all machines share}
HOST0=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# shellcheck disable=SC2016  # SLURM_NODEID is each machine's own
srun bash -c 'torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" --nproc_per_node 8 \
    --master_addr "$0" --master_port 29500 -m distilpeft run "$1" --runs "$2"' "$HOST0" "$RECIPE" "$RUNS"
