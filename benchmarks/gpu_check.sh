#!/usr/bin/env bash
# Everything that needs a GPU to be shown, in stages of less than 8 minutes; one that fails does not stop the next.
#
#   benchmarks/gpu_check.sh [--images FOLDER | --beton FILE] [--samples 4096]
#
# PY is the python to use, OUT where JSON rows and logs go (default benchmarks/results/gpu), STAGES which to run ("tests-kernels tests-loader tests-training
# sanitizer kernels decode loader training"), TLFAST_COMMIT the commit where this is a copy without .git. Ends with a summary, and with status 1 when a stage failed. What cannot run here is skipped with its reason.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PY=${PY:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
OUT=${OUT:-benchmarks/results/gpu}
STAGES=${STAGES:-tests-kernels tests-loader tests-training sanitizer kernels decode loader training}
LIMIT=${LIMIT:-470} # seconds a stage
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
outcomes=()
failed=0

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

for tests in tests-kernels tests-loader tests-training sanitizer; do
    stage $tests "$PY" benchmarks/gpu_tests.py $tests --limit $((LIMIT - 20)) --results "$OUT/tests.jsonl"
done
stage kernels "$PY" benchmarks/gpu_kernels.py --results "$OUT/kernels.jsonl"
stage decode "$PY" benchmarks/gpu_decode.py --results "$OUT/decode.jsonl" "$@"
stage loader "$PY" benchmarks/gpu_loader.py --results "$OUT/loader.jsonl" "$@"
stage training "$PY" benchmarks/gpu_train.py --results "$OUT/train.jsonl" "$@"

echo "== summary"
"$PY" benchmarks/gpu_rows.py "$OUT" || failed=1
printf '%s\n' "${outcomes[@]}"
exit "$failed"
