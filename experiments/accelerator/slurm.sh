#!/usr/bin/env bash
#SBATCH --job-name=msdspn-clevr
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
# CLEVR on several machines of a SLURM cluster, one process a GPU, which is what JAX takes a SLURM
# job for (each process uses the GPU of its number on the machine):
#   RUN=/shared/runs/clevr DATA=/shared/clevr-128 sbatch experiments/accelerator/slurm.sh
#
# RUN and DATA must be folders that all machines see. DATA is what `msdspn data clevr` made, once,
# beforehand: not by all processes at the same time. JAX finds the other processes by SLURM's own
# variables. Two minutes before the time is up the run saves, and the job is queued again; so it is
# after the loss of a machine. The batch must be a multiple of the number of GPUs.
set -euo pipefail
: "${RUN:?a run folder that all machines see}" "${DATA:?what msdspn data clevr made}"

srun --kill-on-bad-exit=1 "${PYTHON:-python3}" -m msdspn_jax.cli train clevr \
    --distributed --parallel shard-map --images-on host \
    --data folder --data-dir "$DATA" --run-dir "$RUN" --resume auto --no-progress "$@" \
    && code=0 || code=$?
# 143: stopped by the signal and saved; 2: another process was lost, or the flags are wrong, which
# is why there is an end to it.
if [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
