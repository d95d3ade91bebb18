#!/usr/bin/env bash
# All experiments, the most telling first:
#
#     examples/paper/run_all.sh OUT [SIZE]        SIZE: full (default), small or tiny
#
# With MINUTES=n all training together ends in n minutes, trained as far as it came. With
# JOBS=n so many runs share the device: steps of small models leave most of a large GPU idle.
# Results are in OUT as they come, and an experiment that fails does not keep the next from
# running.
set -u
out=${1:?usage: run_all.sh OUT [SIZE]}
size=${2:-full}
here=$(dirname "$0")
failed=0

experiment() { # its percentage of the time, its file, its options
  local minutes
  minutes=${MINUTES:+$(awk "BEGIN { print $MINUTES * $1 / 100 }")}
  python3 "$here/$2.py" "${@:3}" --size "$size" --out "$out" \
    --minutes "${minutes:-inf}" --jobs "${JOBS:-1}" || failed=1
}

experiment 40 recall
experiment 32 language_modelling
experiment 16 expand_ratio
experiment 12 length
exit $failed
