#!/usr/bin/env bash
# FineWeb's 350B-token sample on eight machines that share a disk:
#
#     prepare=$(sbatch --parsable scripts/prepare_slurm.sh data/fineweb350B)
#     sbatch --dependency=afterok:$prepare --wrap "python -m jaxgpt.prepare --merge data/fineweb350B"
#
# Each task of the array finds its rank in Slurm's variables and tokenizes an eighth of the files.
# A task that was killed or requeued resumes where it stopped: after a time limit, submit the array
# again. HF_TOKEN raises the Hub's limit on requests.
#SBATCH --job-name=prepare
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@60
#SBATCH --output=prepare-%A-%a.log
set -euo pipefail

out=${1:?folder for the shards, on the shared disk}

# exec, so that Slurm's signal before the time limit reaches Python, which stops between batches.
exec python -m jaxgpt.prepare fineweb --name sample-350BT --out "$out"
