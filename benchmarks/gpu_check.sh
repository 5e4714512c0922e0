#!/usr/bin/env bash
# Whether a build does on an accelerator what its tests say of the CPU, in one command of at most 8 minutes.
#
#   benchmarks/gpu_check.sh                      all checks on cuda, into results/gpu_check
#   benchmarks/gpu_check.sh --only off,nan       some of them
#   benchmarks/gpu_check.sh --tiny               the same path at tiny size on the CPU
#
# Checks: off (disabled is bitwise the plain loop), resume (bitwise), nan (a step found bad late is undone), offload (the
# same run, copies to come back to in host memory), reading (losses are read late, and no step waits for the device),
# overhead (a full step over the bare loop's), memory (held between steps, over what the bare loop holds).
# Files: gpu_check.json results, gpu_check.md the table for docs/benchmarks.md, gpu_check.log what was said.
# Exit status: 0 all that was asked for holds, 1 something does not or there was no time for it, 2 bad usage.
set -u

usage() { sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//'; }

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
OUT=${OUT:-} LIMIT_S=${LIMIT_S:-480} ARGS=()
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) ARGS+=(--tiny) ;;
    --out) OUT=${2:?--out needs a folder}; shift ;;
    --only | --device) ARGS+=("$1" "${2:?$1 needs a value}"); shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu_check.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done
OUT=${OUT:-$ROOT/results/gpu_check}
mkdir -p "$OUT" || exit 2

# a Python that has the package, else one that finds it in this source tree
PY=
for path in "${PYTHONPATH:-}" "$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"; do
  for candidate in ${PYTHON:+"$PYTHON"} "$ROOT/.venv/bin/python" python3; do
    if PYTHONPATH=$path "$candidate" -c "import hybrid_predict_trainer.trainer" 2>/dev/null; then
      PY=$candidate
      export PYTHONPATH=$path
      break 2
    fi
  done
done
if [ -z "$PY" ]; then echo "gpu_check.sh: no Python here has torch: set PYTHON" >&2; exit 1; fi

export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8} # matrix products that repeat to the last bit
timeout --kill-after=10 "$LIMIT_S" "$PY" "$ROOT/benchmarks/gpu_check.py" --out "$OUT" --limit-s "$((LIMIT_S - 10))" \
  "${ARGS[@]}" 2> >(tee "$OUT/gpu_check.log" >&2)
rc=$?
if [ "$rc" -eq 124 ] || [ "$rc" -eq 137 ]; then echo "gpu_check.sh: stopped after $LIMIT_S s; what was done is in $OUT" >&2; rc=1; fi
exit "$rc"
