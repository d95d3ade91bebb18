#!/usr/bin/env bash
# All experiments, the most telling first, each with a share of the time:
#
#     examples/paper/run_all.sh OUT [SIZE]        SIZE: full (default), small or tiny
#
# MINUTES (default 8) is the time of all training together, JOBS (default 4) how many runs
# share the device. What a run reports is in OUT at once, and an experiment that fails or
# is out of time does not keep the next from running.
set -u
out=${1:?the folder to write to}
size=${2:-full}
here=$(dirname "$0")
failed=0

experiment() { # its percentage of the time, its file, its options
  local minutes
  minutes=$(awk "BEGIN { print ${MINUTES:-8} * $1 / 100 }")
  shift
  python3 "$here/$1.py" "${@:2}" --size "$size" --out "$out" --minutes "$minutes" \
    --jobs "${JOBS:-4}" || failed=1
}

experiment 30 recall
experiment 35 language_modelling --parts characters
experiment 20 expand_ratio
experiment 15 length
exit $failed
