#!/usr/bin/env bash
#SBATCH --job-name=layerlens
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%A_%a.out
#
# One task of a sweep for each task of a Slurm job array. On the login node, with the environment of LayerLens active:
#
#   layerlens sweep sweep.yaml                                               # writes the list
#   sbatch --array=0-$(($(wc -l < sweep/tasks.jsonl) - 1)) demos/schedulers/slurm_array.sh sweep.yaml
#   layerlens sweep sweep.yaml --collect                                     # the table, when the array is through
#
# The same sbatch again runs only what is not finished. Add --gpus-per-task=1 where runtime.device is cuda.
set -euo pipefail
sweep=${1:?usage: sbatch --array=0-N slurm_array.sh SWEEP.yaml}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
exec python -m layerlens sweep "$sweep" --task "$SLURM_ARRAY_TASK_ID" --threads "$OMP_NUM_THREADS"
