#!/usr/bin/env bash
# FineWeb's 350B-token sample on the cores of eight machines that share a disk, with Dask under Slurm:
#
#     pip install -e '.[cluster]'
#     sbatch scripts/prepare_slurm.sh data/fineweb350B
#
# The scheduler and the command run on the first machine, workers on all of them. After a time limit,
# a kill or a requeue the same job resumes. HF_TOKEN raises the Hub's limit on requests.
#SBATCH --job-name=prepare
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --output=prepare-%j.log
set -euo pipefail

out=${1:?folder for the shards, on the shared disk}
port=$((20000 + SLURM_JOB_ID % 10000))
address=tcp://$(hostname):$port

dask scheduler --port "$port" --no-dashboard &
srun dask worker "$address" --nworkers "$SLURM_CPUS_PER_TASK" --nthreads 1 --no-dashboard &

# exec, so that Slurm's signal before the time limit reaches Python. The job ends with it.
exec python -m jaxgpt.prepare fineweb --name sample-350BT --out "$out" --cluster "$address"
