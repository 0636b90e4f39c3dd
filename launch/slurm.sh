#!/usr/bin/env bash
# Run one process on each node of a SLURM cluster, with all GPUs of the node:
#
#   sbatch --nodes=8 launch/slurm.sh --config=configs/sprint.py:sana_600m --workdir=/shared/run ...
#
# --workdir must be on a file system that all nodes share. The processes find each other by SLURM's
# variables. Port 29400 + 2 x (job id mod 10000) and the next one must be open between nodes. SLURM
# sends SIGTERM five minutes before the time limit: the job saves and ends. Submit the same command
# again to resume.
#SBATCH --job-name=sprint_jax
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "this script is for sbatch: sbatch --nodes=N launch/slurm.sh --config=... --workdir=..." >&2
  exit 2
fi
# --kill-on-bad-exit=1: a process that fails ends the others instead of leaving nodes idle.
exec srun --kill-on-bad-exit=1 python -u -m sprint_jax.main "$@"
