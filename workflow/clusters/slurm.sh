#!/bin/bash
# A run on some nodes of a Slurm cluster, as one allocation: a Ray cluster of all its nodes, and Snakemake on the first.
#   sbatch --nodes=2 --gpus-per-node=8 workflow/clusters/slurm.sh --configfile configs/paper.yaml
# Needs .venv (make setup) in the folder that sbatch is called in, on storage that the nodes share. The same command goes on
# after an end of the allocation.
#SBATCH --job-name=deltamem
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail
export PATH="$PWD/.venv/bin:$PATH"
: "${SLURM_JOB_NODELIST:?this is started by sbatch, see its second line}"
command -v snakemake ray > /dev/null || { echo "no snakemake and ray in $PWD/.venv/bin: make setup there, or call sbatch in the project's folder" >&2; exit 1; }
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN="${RAY_AUTH_TOKEN:-$(head --bytes=24 /dev/urandom | od --address-radix=n --format=x1 | tr --delete ' \n')}"
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600  # seconds; Ray's 30 are too few for nodes that load it from shared storage
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head --lines=1)
snakemake --unlock "$@" || true  # an allocation that ran out leaves its lock
# one Ray node a machine, which gives each worker a GPU of its own; every node ends when Snakemake does
srun --kill-on-bad-exit ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  snakemake --workflow-profile workflow/profiles/ray-cluster "$@"
