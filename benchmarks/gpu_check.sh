#!/usr/bin/env bash
# Everything that needs a GPU to be shown, in stages; one that fails does not stop the next.
#
#   benchmarks/gpu_check.sh [--images FOLDER | --beton FILE] [--samples 4096]
#
# PY: the python to use.
# OUT: where rows.jsonl, to which every stage appends, and a log a stage go (default benchmarks/results/gpu).
# STAGES: which to run, in the order of the default below. "first" takes a minute and says whether the others can run.
# SWITCHES: which of the sweep's switches, comma-separated, as `gpu_profile.py --sweep` names them (default all).
# LIMIT: seconds a stage.
# TLFAST_COMMIT: the commit, where this is a copy without .git.
#
# Where a command may take ten minutes only, docs/benchmarks.md has the stages in parts. Ends with a summary, and with
# status 1 when a stage failed. What cannot run here is skipped with its reason.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/results/gpu}
STAGES=${STAGES:-first tests-kernels kernels profile training sweep loader decode tests-training tests-loader sanitizer}
LIMIT=${LIMIT:-470} # seconds a stage
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
outcomes=()
failed=0

# numba-cuda finds libNVVM in pip's nvidia-nvvm by itself, and a CUDA toolkit's through CUDA_HOME.
nvcc=$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")
for toolkit in "${CUDA_HOME:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda /usr/local/cuda-*; do
    if [ -d "$toolkit/nvvm/lib64" ]; then export CUDA_HOME=$toolkit; break; fi
done

no_gpu=""
"$PY" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)'
case $? in
    0) ;;
    3) no_gpu="skipped: no CUDA device" ;;
    *) echo "$PY cannot import torch: set PY to a python that can" >&2; exit 2 ;;
esac

stage() { # name, command...
    local name=$1 start=$SECONDS status
    shift
    case " $STAGES " in *" $name "*) ;; *) return ;; esac
    echo "== $name"
    if [ -n "$no_gpu" ]; then
        echo "$no_gpu"
        outcomes+=("$name: $no_gpu")
        return
    fi
    timeout --kill-after=10 "$LIMIT" "$@" 2>&1 | tee "$OUT/$name.log"
    status=${PIPESTATUS[0]}
    if [ "$status" = 0 ]; then
        local skipped
        skipped=$(grep -oh 'skipped: .*' "$OUT/$name.log" | sort -u | paste -sd ';' | sed 's/;/; /g')
        outcomes+=("$name: ran, $((SECONDS - start)) s${skipped:+; $skipped}")
    else
        failed=1
        outcomes+=("$name: FAILED with status $status after $((SECONDS - start)) s (124: the limit of $LIMIT s), see $OUT/$name.log")
    fi
}

bench() { # stage, file, argument...
    local name=$1 file=$2
    shift 2
    stage "$name" "$PY" "benchmarks/$file" --results "$OUT/rows.jsonl" "$@"
}
tests() { stage "$1" "$PY" benchmarks/gpu_tests.py "$1" --limit $((LIMIT - 20)) --results "$OUT/rows.jsonl"; }

bench first gpu_first.py
tests tests-kernels
bench kernels gpu_kernels.py
bench profile gpu_profile.py
bench training gpu_train.py "$@"
IFS=, read -ra switches <<< "${SWITCHES:-}"
bench sweep gpu_profile.py --sweep "${switches[@]}"
bench loader gpu_loader.py "$@"
bench decode gpu_decode.py "$@"
for name in tests-training tests-loader sanitizer; do tests $name; done

echo "== summary"
"$PY" benchmarks/gpu_rows.py "$OUT" || failed=1
printf '%s\n' "${outcomes[@]}"
exit "$failed"
