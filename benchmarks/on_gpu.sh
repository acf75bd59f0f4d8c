#!/usr/bin/env bash
# The whole measurement on a machine with one GPU, in one command, under 9 minutes:
#
#     benchmarks/on_gpu.sh OUT_DIR [--dry]
#     benchmarks/on_gpu.sh OUT_DIR --training [--dry]
#     benchmarks/on_gpu.sh OUT_DIR --study [--dry]
#
# OUT_DIR must be new, empty, or one that this script has filled before: then its results are replaced.
#
# --training measures whole training runs instead, in under 9 minutes of its own: tokens a second at 2k, 8k and 32k tokens
# on a 0.6B-shaped model, beside TRL where it is installed, and the longest pair within 80 GiB.
#
# --study goes on with `fastpref study --size 124m` in runs/study-124m for up to 9 minutes; call it again until it has
# ended. OUT_DIR receives its results and report once it has.
#
# It needs no network and no installation: Python with torch, triton, rich, matplotlib, pytest (and what tests import).
# Rivals that are installed take part. Each part has its own time limit, and one that fails or runs out of time does not
# stop the next; rows are saved one by one, so that what was measured stays. OUT_DIR receives REPORT.md (one page: read
# it first), the results as JSON, plots/, and a log of each part. The exit code is the number of parts that failed.
#
# --dry runs every line on a CPU, with tiny cases and Triton's interpreter, to prove the script where there is no GPU.
# PYTHON chooses the interpreter (python3).
set -u

usage() {
    echo "usage: $0 OUT_DIR [--training | --study] [--dry]" >&2
    exit 2
}
[ "$#" -ge 1 ] || usage
dry='' training='' study=''
for option in "${@:2}"; do
    case $option in
    --dry) dry=--dry ;;
    --training) training=--training ;;
    --study) study=--study ;;
    *) usage ;;
    esac
done
if [ -n "$(ls -A "$1" 2>/dev/null)" ] && [ ! -f "$1/parts.txt" ]; then
    echo "$1 holds files, and none is parts.txt of an earlier run: give a new or empty OUT_DIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

# fastpref is three folders of the repository; a folder of links makes them one package, without pip.
mkdir -p "$scratch/path/fastpref"
for entry in "$root"/fastpref/*; do
    ln -s "$entry" "$scratch/path/fastpref/"
done
ln -s "$root/kernels" "$scratch/path/fastpref/kernels"
ln -s "$root/benchmarks" "$scratch/path/fastpref/benchmarks"
export PYTHONPATH="$scratch/path${PYTHONPATH:+:$PYTHONPATH}"
# Keeps the working directory off the path: kernels/ there is another project's name, which transformers imports.
export PYTHONSAFEPATH=1
export PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR="$scratch/triton"
export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor"
export HF_HUB_OFFLINE=1 MPLBACKEND=Agg
unset TRITON_INTERPRET FASTPREF_BACKEND FASTPREF_VALIDATE

"$python" -c '
import pathlib, sys
from fastpref.folders import FolderError, Owner, claim
try:
    claim(pathlib.Path(sys.argv[1]), Owner("benchmarks/on_gpu.sh", resume=True))
except FolderError as error:
    sys.exit(f"on_gpu.sh: error: {error}")
' "$out" || exit 2
parts="$out/parts.txt"
: >"$parts"

if [ -n "$dry" ]; then
    export CUDA_VISIBLE_DEVICES=
    tests=("$root/tests/test_doctor.py")
    class=tiny
    device=cpu
    tiny=(--tiny)
    within=(--tiny)
    within_training=(--tiny --provider plain_cached --most 64)
    interpreter=(env TRITON_INTERPRET=1)
else
    tests=("$root/tests")
    class=gpu
    device=cuda
    tiny=()
    within=(--within 80GiB)
    within_training=(--within 80GiB)
    interpreter=(env)
fi
# Tests share the GPU well; each worker takes two cores, or they fight for them.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    count=$(($(nproc) / 2))
    workers=(-n "$((count > 8 ? 8 : count))")
fi

# part NAME SECONDS COMMAND...: runs the command from the repository's root, its output in OUT_DIR/NAME.log.
part() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name (at most $limit s)"
    (cd "$root" && timeout --kill-after=5 "$limit" "$@") >"$out/$name.log" 2>&1
    code=$?
    if [ "$code" -ne 0 ]; then
        failed=$((failed + 1))
    fi
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
        code="$code (time limit)"
    fi
    echo "$name: exit $code, $((SECONDS - start)) s of $limit" | tee -a "$parts"
}

# suites NAME SECONDS SUITE...: a results file and pictures of the suites.
suites() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m fastpref.cli bench --device_class "$class" --suite "$@" \
        --output_dir "$out/$name" --name "$name" --overwrite --no_plots
    mv "$out/$name/$name.json" "$out"  # beside the other results, for the report
}

environment() {
    date -u
    nvidia-smi || [ -n "$dry" ] || return 1
    "$python" -m fastpref.doctor --device "$device"
}
export -f environment
export python dry device

if [ -n "$study" ]; then
    size=124m
    [ -z "$dry" ] || size=tiny
    part study 540 "$python" -m fastpref.cli study --size "$size" --output_dir "$root/runs/study-$size"
    cp "$root/runs/study-$size"/{results.json,README.md,*.png} "$out" 2>/dev/null || echo "the study has not ended yet"
    tail -n 5 "$out/study.log"
    exit "$failed"
fi

rm -rf "$out"/*.json "$out"/*.log "$out"/REPORT.md "$out"/plots
part environment 20 bash -c environment
if [ -n "$training" ]; then
    part training 300 "$python" -m fastpref.benchmarks.training --class "$class" --device "$device" --seconds 280 \
        --json "$out/training.json"
    part longest-training 190 "$python" -m fastpref.benchmarks.longest --training --device "$device" --seconds 175 \
        "${within_training[@]}" --json "$out/longest-training.json"
else
    part tests 155 env OMP_NUM_THREADS=2 "$python" -m pytest "${tests[@]}" \
        -p no:cacheprovider -q ${workers[@]+"${workers[@]}"}
    suites linear 70 linear
    suites logits 65 logps losses
    suites step 55 step
    part longest 60 "$python" -m fastpref.benchmarks.longest --device "$device" --seconds 55 "${within[@]}" \
        --json "$out/longest.json"
    part blocks 35 "${interpreter[@]}" "$python" -m fastpref.benchmarks.sweep --json "$out/blocks.json" \
        ${tiny[@]+"${tiny[@]}"}
    part tiles 30 "$python" -m fastpref.benchmarks.sweep --linear --json "$out/tiles.json" ${tiny[@]+"${tiny[@]}"}
    if command -v compute-sanitizer >/dev/null; then
        # Without the allocator's cache every tensor has borders that the checker sees.
        part memcheck 25 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m fastpref.doctor --device "$device"
    else
        echo "memcheck: not run, no compute-sanitizer on the PATH" | tee -a "$parts"
    fi
fi
part report 20 "$python" -m fastpref.benchmarks.report --results "$out"

# One page: what ran and on what, failed tests, and then the tables and pictures of report.py.
page="$scratch/page.md"
{
    echo "<!-- written by on_gpu.sh and python -m fastpref.benchmarks.report -->"
    echo "# fastpref on $(uname -n), $(date -u '+%Y-%m-%d %H:%M UTC')${dry:+ (DRY RUN: its numbers mean nothing)}"
    echo
    echo '```'
    cat "$parts"
    echo
    grep -E 'torch |triton |cuda:|path:|error against' "$out/environment.log"
    echo
    if [ -z "$training" ]; then
        tail -n 1 "$out/tests.log"
        grep -hE '^(FAILED|ERROR) ' "$out/tests.log" | cut -c1-160 | head -n 12
    fi
    grep -hE ': (met|MISSED)$|^LOSSES DISAGREE' "$out"/*.log
    if [ -f "$out/memcheck.log" ]; then
        grep -E 'ERROR SUMMARY|Device not supported' "$out/memcheck.log"
    fi
    echo '```'
    echo
    if [ -f "$out/REPORT.md" ]; then
        cat "$out/REPORT.md"
    fi
} >"$page" 2>/dev/null
mv "$page" "$out/REPORT.md"
echo
sed -n '5,/^```$/p' "$out/REPORT.md"
exit "$failed"
