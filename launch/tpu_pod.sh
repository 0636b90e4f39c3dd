#!/usr/bin/env bash
# Run one process on each host of a TPU pod slice (Cloud TPU VMs):
#
#   launch/tpu_pod.sh NAME ZONE --config=configs/sprint.py:sana_600m --config.mesh.fsdp=64 \
#       --workdir=/shared/run ...
#
# NAME and ZONE are those of the slice. Each host needs the project in ~/sprint_jax, with its
# requirements and jax[tpu] in ~/sprint_jax/.venv. --workdir and the data must be on storage that
# all hosts mount. Hosts find each other by the metadata of the slice. A preempted slice saves
# first: create it again and run the same command.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE --config=... --workdir=..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
arguments=$(printf ' %q' "$@")
remote='
  metadata=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  attribute() { curl -sf -H "Metadata-Flavor: Google" "$metadata/$1"; }
  # id:port:address of each worker, separated by commas
  hosts=$(attribute worker-network-endpoints | tr "," "\n" | cut -d: -f3)
  cd ~/sprint_jax && . .venv/bin/activate
  exec python -u -m sprint_jax.main'"$arguments"' \
    --coordinator="$(echo "$hosts" | head -1):29400" --processes="$(echo "$hosts" | wc -l)" \
    --process="$(attribute agent-worker-number)"
'
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote"
