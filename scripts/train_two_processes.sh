#!/usr/bin/env bash
# One run as two processes on this machine, without a GPU: to try what several machines do.
#
#     scripts/train_two_processes.sh --max-iters 200
#     kill PID of one of them: both save at the same step, and the same command resumes
#     kill -9 PID of one: the other exits within a minute, and the same command resumes
#
# On several machines every process gets the address of process 0, the number of processes, its own id.
set -euo pipefail

address=127.0.0.1:${PORT:-9876}
export XLA_FLAGS="--xla_force_host_platform_device_count=2" # two devices each, four in all
pids=()
for process in 0 1; do
    python -m jaxgpt.train --preset demo --device cpu --batch-size 3 --out-dir runs/two-processes \
        --coordinator-address "$address" --num-processes 2 --process-id "$process" "$@" &
    pids+=($!)
    echo "process $process is PID $!"
done
# A script's background processes ignore Ctrl-C.
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
code=0
for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    while kill -0 "$pid" 2>/dev/null; do # the wait was interrupted, the process is still running
        status=0
        wait "$pid" || status=$?
    done
    ((status == 0)) || code=$status
done
exit "$code"
