#!/usr/bin/env bash
# The whole measurement on a machine with one GPU, in one command, under 9 minutes:
#
#     benchmarks/on_gpu.sh OUT_DIR [--dry]
#
# It needs no network and no installation: Python with torch, triton, pytest, pytest-benchmark (and what tests import).
# Parts: environment, tests on real kernels, benchmarks with the copy bandwidth, benchmarks of the linear path, block-size
# and tile sweeps, CUDA memory check.
# Each has its own time limit, and one that fails does not stop the next. OUT_DIR receives eight files at most.
# The exit code is the number of parts that failed.
#
# --dry runs every line on a CPU, with tiny cases and Triton's interpreter, to prove the script where there is no GPU.
# PYTHON chooses the interpreter (python3).
set -u

if [ "$#" -lt 1 ] || [ "$#" -gt 2 ] || { [ "$#" -eq 2 ] && [ "$2" != "--dry" ]; }; then
    echo "usage: $0 OUT_DIR [--dry]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
dry=${2:-}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
summary="$out/summary.txt"
parts="$scratch/parts"
: >"$summary"
: >"$parts"
failed=0

# fastpref is two folders of the repository; a folder of links makes them one package, without pip.
mkdir -p "$scratch/path/fastpref"
for entry in "$root"/fastpref/*; do
    ln -s "$entry" "$scratch/path/fastpref/"
done
ln -s "$root/kernels" "$scratch/path/fastpref/kernels"
export PYTHONPATH="$scratch/path${PYTHONPATH:+:$PYTHONPATH}"
# Keeps the working directory off the path: kernels/ there is another project's name, which transformers imports.
export PYTHONSAFEPATH=1
export PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR="$scratch/triton"
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
export HF_HUB_OFFLINE=1
unset TRITON_INTERPRET FASTPREF_BACKEND FASTPREF_VALIDATE

if [ -n "$dry" ]; then
    export CUDA_VISIBLE_DEVICES=
    tests=("$root/tests/test_doctor.py")
    cases=tiny
    sweep=(env TRITON_INTERPRET=1 "$python" "$root/benchmarks/sweep.py" --tiny)
    tiles=("$python" "$root/benchmarks/sweep_tiles.py" --tiny)
    device=cpu
else
    tests=("$root/tests")
    cases=gpu
    sweep=("$python" "$root/benchmarks/sweep.py")
    tiles=("$python" "$root/benchmarks/sweep_tiles.py")
    device=cuda
fi
# Tests share the GPU well; each worker takes two cores, or they fight for them.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    count=$(($(nproc) / 2))
    workers=(-n "$((count > 8 ? 8 : count))")
fi

# part NAME SECONDS LOG COMMAND...: runs the command from the repository's root, output appended to LOG.
part() {
    local name=$1 limit=$2 log=$3 start=$SECONDS code
    shift 3
    echo "== $name (at most $limit s)"
    (cd "$root" && timeout --kill-after=10 "$limit" "$@") >>"$log" 2>&1
    code=$?
    if [ "$code" -ne 0 ]; then
        failed=$((failed + 1))
    fi
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        code="$code (time limit)"
    fi
    echo "$name: exit $code, $((SECONDS - start)) s" | tee -a "$parts"
}

environment() {
    date -u
    nvidia-smi || [ -n "$dry" ] || return 1
    "$python" -m fastpref.doctor --device "$device"
}
export -f environment
export python dry device

rm -f "$out"/{environment.txt,tests.log,benchmarks.log,benchmarks.json,linear.json,sweep.json,memcheck.log}
part environment 30 "$out/environment.txt" bash -c environment
part tests 185 "$out/tests.log" env OMP_NUM_THREADS=2 "$python" -m pytest "${tests[@]}" \
    -p no:cacheprovider -q ${workers[@]+"${workers[@]}"}
part benchmarks 110 "$out/benchmarks.log" "$python" -m pytest "$root/benchmarks"/test_bench_lo*.py \
    -p no:cacheprovider -q --device-class "$cases" --results "$out/benchmarks.json"
part linear 75 "$out/benchmarks.log" "$python" -m pytest "$root/benchmarks/test_bench_linear.py" \
    -p no:cacheprovider -q --device-class "$cases" --results "$out/linear.json"
part sweep 60 "$out/benchmarks.log" "${sweep[@]}" --json "$out/sweep.json"
part tiles 40 "$out/benchmarks.log" "${tiles[@]}"
if command -v compute-sanitizer >/dev/null; then
    # Without the allocator's cache every tensor has borders that the checker sees.
    part memcheck 35 "$out/memcheck.log" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m fastpref.doctor --device "$device"
else
    echo "memcheck: not run, no compute-sanitizer on the PATH" | tee -a "$parts"
fi

# One page: what ran, the machine, failed tests, the tables, the sweep, what the memory check said.
{
    echo "fastpref on $(uname -n), $(date -u '+%Y-%m-%d %H:%M UTC')${dry:+, DRY RUN: its numbers mean nothing}"
    cat "$parts"
    echo
    grep -E 'torch |triton |cuda:|path:|error against' "$out/environment.txt"
    echo
    tail -n 1 "$out/tests.log"
    grep -hE '^(FAILED|ERROR) ' "$out/tests.log" "$out/benchmarks.log" | cut -c1-160 | head -n 12
    echo
    sed -n '/=== fastpref ===/,/rows in /p' "$out/benchmarks.log"
    echo
    grep -E ' (forward|backward): best |^H=' "$out/benchmarks.log"
    if [ -f "$out/memcheck.log" ]; then
        grep -E 'ERROR SUMMARY|Device not supported' "$out/memcheck.log"
    fi
} >>"$summary" 2>&1
echo
cat "$summary"
exit "$failed"
