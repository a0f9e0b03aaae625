#!/usr/bin/env bash
# One run on two machines of eight cards each, data-parallel:
#
#     sbatch scripts/train_slurm.sh --preset gpt2-124m --batch-size 32
#     sbatch scripts/train_slurm.sh --preset 80gb-350m --mesh data=2,fsdp=8 --batch-size 32
#
# srun starts a process per card, and JAX finds the others in Slurm's variables. --out-dir and the
# data have to be on a disk that all machines share. Two minutes before the time limit Slurm sends
# SIGTERM, all processes save at the same step, and the job is requeued and resumes; likewise when a
# machine fails.
#SBATCH --job-name=jaxgpt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train-%j.log
set -euo pipefail

started=$SECONDS
# If one process dies, the others exit within a minute; --kill-on-bad-exit ends any that do not.
if srun --kill-on-bad-exit=1 python -m jaxgpt.train "$@"; then
    # Done, or stopped by the signal with everything saved; then the run has to be resumed.
    limit=$(squeue --noheader --format=%L --job "$SLURM_JOB_ID")
    case $limit in 0:* | 1:* | 2:*) scontrol requeue "$SLURM_JOB_ID" ;; esac
elif ((SECONDS - started > 600)); then # not a wrong flag, but a machine or a card
    scontrol requeue "$SLURM_JOB_ID"
fi
