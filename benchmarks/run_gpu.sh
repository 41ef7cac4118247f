#!/usr/bin/env bash
# Everything a GPU has to show, in one call:
#
#     benchmarks/run_gpu.sh OUTPUT_DIR [WHEELS]
#
#   1. every Triton kernel against the reference, compiled
#   2. the kernel table: relay beside whatever else is installed, until the time is up
#
# Needs a GPU, and a python3 (or $PYTHON) with PyTorch, Triton, numpy, psutil and pytest; no network. WHEELS is a folder
# of wheels of other kernels (flashinfer-python, say) that are installed for this run alone. KERNEL_SECONDS (300) is for
# step 2. What was measured before an error is kept. The exit status is that of the first step that failed.
set -uo pipefail

out=${1:?usage: benchmarks/run_gpu.sh OUTPUT_DIR [WHEELS]}
wheels=${2:-}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$root/kernels:$root/models:$root/serving:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
status=0

if [ -n "$wheels" ]; then
    peers=$(mktemp -d)
    trap 'rm -rf "$peers"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --target "$peers" "$wheels"/*.whl || status=$?
    export PYTHONPATH="$PYTHONPATH:$peers"
fi

echo "== machine"
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
} | tee "$out/machine.txt"

echo "== kernels against the reference"
(cd "$root" && "$python" -m pytest tests/kernels/test_triton.py tests/kernels/test_triton_plan.py tests/kernels/test_plan.py -q -x -m "" -p no:cacheprovider) 2>&1 | tee "$out/correctness.txt"
correct=${PIPESTATUS[0]}
if [ "$correct" -ne 0 ]; then
    echo "a kernel is wrong: nothing is timed" >&2
    exit "$correct"
fi

echo "== kernel table"
"$python" -m relay_benchmarks.kernel --device cuda --seconds "${KERNEL_SECONDS:-300}" --output "$out/kernel.csv" \
    2> >(tee "$out/kernel.log" >&2) | tee "$out/kernel.txt"
found=${PIPESTATUS[0]}
[ "$status" -ne 0 ] || status=$found

exit "$status"
