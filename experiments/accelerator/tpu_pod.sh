#!/usr/bin/env bash
# CLEVR on a TPU pod slice, the same command on each of its machines:
#   TPU=name ZONE=zone RUN=/mnt/shared/clevr DATA=/mnt/shared/clevr-128 \
#       experiments/accelerator/tpu_pod.sh [flags of msdspn train clevr]
#
# The package lies on every machine in the folder REPO (default ~/msdspn_jax, with jax[tpu]
# installed), and all of them see RUN and DATA (a Filestore or a Parallelstore mounted there). JAX
# finds the others by the slice's metadata. The same command again goes on, on a slice of another
# size too: the batch must be a multiple of the number of its cores.
set -euo pipefail
: "${TPU:?name of the slice}" "${ZONE:?its zone}" "${RUN:?}" "${DATA:?}"
repo="${REPO:-msdspn_jax}"
command="cd $repo && ${PYTHON:-python3} -m msdspn_jax.cli train clevr --distributed"
command+=" --parallel shard-map --images-on host --data folder --data-dir $DATA"
command+=" --run-dir $RUN --resume auto --no-progress $*"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$command"
