#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command and without a network:
#
#     scripts/gpu_check.sh [OUT_FOLDER] [WHEEL_FOLDER]
#
# builds the package from this tree for the GPU at hand, runs the whole test suite with CUDA, runs
# compute-sanitizer (memcheck and racecheck) over a small part of it, runs the benchmarks, and writes
# OUT_FOLDER/gpu_check.json, cuda.json (the benchmarks), cuda.md and cuda.png, and the same of the
# populations as cuda_population.md and .png. Needs nvcc and a python3
# with a CUDA build of torch. What else Python needs (scripts/gpu_wheels.txt) is taken from WHEEL_FOLDER
# where that is given (see `pip download -r scripts/gpu_wheels.txt`), or must be installed.
# Exits non-zero if any part failed; later parts run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-bench/results}" && cd "${1:-bench/results}" && pwd)
wheels=${2:-}
site=$(mktemp -d)
export PYTHONPATH="$site" PYTHONUNBUFFERED=1

if [ -n "$wheels" ]; then
    python3 -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$site" \
        -r scripts/gpu_wheels.txt || exit 1
    export PATH="$site/bin:$PATH"
fi

declare -A result seconds
part() { # part NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    echo "=== $name"
    if "$@" >"$out/gpu_check.$name.log" 2>&1; then result[$name]=passed; else result[$name]=failed; fi
    seconds[$name]=$((SECONDS - start))
    tail -n 15 "$out/gpu_check.$name.log"
    echo "=== $name ${result[$name]} in ${seconds[$name]} s"
}

arch=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 1
part build env FASTKD_CUDA=ON CUDAARCHS="$arch" python3 -m pip install --no-index --no-build-isolation \
    --no-deps --target "$site" .
if [ "${result[build]}" = passed ]; then
    part info python3 -m fastkd info
    part tests python3 -c "import sys, pytest; sys.exit(pytest.main(['-m', 'not large', '-p', 'no:cacheprovider']))"
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            part "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -c \
                "import sys, pytest; sys.exit(pytest.main(['tests/core/test_ops.py', 'tests/core/test_network.py', '-k', 'cuda and (layout or index_dtypes or tensor_cores or moments_of)', '-p', 'no:cacheprovider']))"
        done
    fi
    part benchmarks python3 -c "import sys, pytest; sys.exit(pytest.main(['bench', '--device', 'cuda', '--seconds', '15', '--benchmark-json=$out/cuda.json', '-p', 'no:cacheprovider']))"
    part report python3 -m bench.report "$out/cuda.json"
fi

failed=0
{
    echo '{'
    echo "  \"commit\": \"$(git rev-parse HEAD 2>/dev/null || echo unknown)\","
    echo "  \"gpu\": \"$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)\","
    echo "  \"driver\": \"$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)\","
    echo "  \"torch\": \"$(python3 -c 'import torch; print(torch.__version__)')\","
    echo '  "parts": {'
    separator=''
    for name in build info tests memcheck racecheck benchmarks report; do
        printf '%s    "%s": {"result": "%s", "seconds": %s}' "$separator" "$name" "${result[$name]:-not run}" \
            "${seconds[$name]:-0}"
        separator=$',\n'
        [ "${result[$name]:-not run}" = passed ] || failed=1
    done
    printf '\n  }\n}\n'
} >"$out/gpu_check.json"
cat "$out/gpu_check.json"
exit $failed
