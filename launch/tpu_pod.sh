#!/usr/bin/env bash
# One process on every host of a TPU pod slice (Cloud TPU VMs):
#
#   launch/tpu_pod.sh NAME ZONE --config=configs/sprint.py:sana_600m --config.mesh.fsdp=64 --workdir=/shared/run ...
#
# NAME and ZONE are the slice's. The project must lie in ~/sprint_jax on every host, with its requirements and
# jax[tpu] in ~/sprint_jax/.venv; --workdir and the data on storage that all hosts mount. Hosts find each other
# by the slice's metadata. A preempted slice saves first; create it again and give the same command.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: launch/tpu_pod.sh NAME ZONE --config=... --workdir=..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
arguments=$(printf ' %q' "$@")
remote='
  attribute() { curl -sf -H "Metadata-Flavor: Google" "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"; }
  # id:port:address of every worker, separated by commas
  hosts=$(attribute worker-network-endpoints | tr "," "\n" | cut -d: -f3)
  cd ~/sprint_jax && . .venv/bin/activate
  exec python -u -m sprint_jax.main'"$arguments"' \
    --coordinator="$(echo "$hosts" | head -1):29400" --processes="$(echo "$hosts" | wc -l)" --process="$(attribute agent-worker-number)"
'
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote"
