#!/bin/sh
# What a GPU does with this program, in at most 9 minutes: kernels, memory, speed, equality and loading, each
# beside what was predicted for a 7 B model without one (gpu.py says how). Nothing is downloaded.
#
#     sh benchmarks/gpu.sh                 on a GPU with 24 GiB or more; 80 GiB for all of it
#     sh benchmarks/gpu.sh --tiny          on any machine, in a few minutes: that every piece runs
#     sh benchmarks/gpu.sh --folder DIR    where the parts and gpu.json go; by default gpu-results
#
# Every part is a process of its own with a limit of its own, so that one that fails leaves the others.
set -u
cd "$(dirname "$0")/.." || exit 1
tiny="" folder=gpu-results python="${PYTHON:-python}"
while [ $# -gt 0 ]; do
    case "$1" in
        --tiny) tiny=--tiny ;;
        --folder) folder=$2; shift ;;
        *) echo "gpu.sh: $1 is not known: --tiny, --folder DIR"; exit 2 ;;
    esac
    shift
done
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
mkdir -p "$folder" || exit 1
for part in kernels:60 memory:90 recovery:40 ratios:180 equality:60 loading:60; do
    name=${part%:*} limit=${part#*:}
    [ -n "$tiny" ] && limit=600
    rm -f "$folder/$name.json"
    echo "== $name (at most $limit s)"
    timeout "$limit" "$python" benchmarks/gpu.py "$name" $tiny --folder "$folder" || echo "== $name: not finished"
done
"$python" benchmarks/gpu.py table --folder "$folder"
