#!/usr/bin/env bash
# Run N processes on this machine as one:
#
#   launch/local.sh N --config=configs/sprint.py --workdir=DIR ...
#
# Each line of output begins with the number of its process. Ctrl-C stops all processes; they save
# first. The script picks two free ports. Environment:
#   PYTHON   interpreter (default: python)
#   DEVICES  simulated CPU devices of each process (default: the devices of the machine)
set -uo pipefail
if [ $# -lt 1 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
  echo "usage: launch/local.sh N --config=... --workdir=... (N: number of processes)" >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}
if [ -n "${DEVICES:-}" ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi
port=$("$python" - <<'END'
import random, socket
# Two adjacent ports that nobody listens on. At random, because two jobs may look at the same time.
for port in random.sample(range(20000, 32000, 2), 6000):
    try:
        with socket.socket() as a, socket.socket() as b:
            a.bind(("", port)), b.bind(("", port + 1))
        print(port)
        break
    except OSError:
        pass
END
)

pids=()
for i in $(seq 0 $((count - 1))); do
  "$python" -u -m sprint_jax.main "$@" --coordinator="127.0.0.1:$port" \
    --processes="$count" --process="$i" \
    > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done
stop() { kill -TERM "${pids[@]}" 2>/dev/null; }
trap stop INT TERM

worst=0
for pid in "${pids[@]}"; do
  # A trapped signal ends a wait early: wait again until the process is gone.
  while true; do
    wait "$pid"
    status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  [ "$status" -gt "$worst" ] && worst=$status
done
exit "$worst"
