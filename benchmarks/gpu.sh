#!/usr/bin/env bash
# The measurements that need an accelerator, in pieces: every unit leaves one JSON file in the output folder, and a unit
# whose file is there is not run again, so the script can be stopped at any time and called again until all is done.
#
#   benchmarks/gpu.sh                            all parts on cuda, into results/gpu
#   PARTS="a b" LIMIT_S=500 benchmarks/gpu.sh    some parts; at most 500 s per unit
#   BUDGET_S=560 benchmarks/gpu.sh               starts no unit it has no time for: call it again to go on
#   benchmarks/gpu.sh --tiny                     the same path at tiny size on the CPU
#
# Parts: a environment; b acceptance of a 100M-class model; c one pass over text at 124 M in bfloat16; d overhead, late
# reading of losses, memory; e the whole stack; f ResNet-18, BERT, GPT-2; g today's GPT at equal
# wall-clock: plain, four rates, ours.
# Files: UNIT.json result, status/UNIT.json what became of it, log/UNIT.log, runs/UNIT the comparison's own folder.
# Exit status: 0 all that was asked for is there (or cannot be had here), 1 a unit failed or is still to do, 2 bad usage.
set -u

usage() { sed -n '2,15p' "$0" | sed 's/^# \{0,1\}//'; }

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
TINY=
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) TINY=1 ;;
    --out) OUT=${2:?--out needs a folder}; shift ;;
    --parts) PARTS=${2:?--parts needs letters}; shift ;;
    --device) DEVICE=${2:?--device needs a name}; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "gpu.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
  esac
  shift
done

PARTS=${PARTS:-a b c d e f g}
LIMIT_S=${LIMIT_S:-540}
BUDGET_S=${BUDGET_S:-0}
if [ -n "$TINY" ]; then
  OUT=${OUT:-$ROOT/results/gpu-tiny} DEVICE=${DEVICE:-cpu} PRESET=${PRESET:-0.3M} SEEDS=${SEEDS:-1} STEPS=${STEPS:-4}
  BATCH=${BATCH:-2} CONTEXT=${CONTEXT:-16} PAIRS=${PAIRS:-30} STACK_STEPS=${STACK_STEPS:-6} ROUNDS=${ROUNDS:-3}
  SECONDS_EACH=${SECONDS_EACH:-0.2} EQUAL=(--data-bytes 200000 --pilot-steps 2)
  SIZE=(--data-bytes 200000 --threads 1) FAST=() STACK=(--data-bytes 200000 --without compile)
  IMAGES=(--task cifar --batch-size 4) BERT=(--task bert --batch-size 2) GPT2=(--task gpt --preset "$PRESET" --batch-size 2 --context 16 "${SIZE[@]}")
else
  OUT=${OUT:-$ROOT/results/gpu} DEVICE=${DEVICE:-cuda} PRESET=${PRESET:-124M} SEEDS=${SEEDS:-3} STEPS=${STEPS:-300}
  BATCH=${BATCH:-16} CONTEXT=${CONTEXT:-1024} PAIRS=${PAIRS:-40} STACK_STEPS=${STACK_STEPS:-100} ROUNDS=${ROUNDS:-10}
  SIZE=() FAST=(--bf16 --fused --compile) STACK=()
  SECONDS_EACH=${SECONDS_EACH:-150} EQUAL=(--bf16 --fused)
  # TinyStories where it is at hand, else the text that comes with Python
  DATA=${DATA:-$([ -d "${HPT_DATA_DIR:-/nonexistent}/text/tinystories" ] && echo tinystories)}
  if [ -n "$DATA" ]; then SIZE=(--data "$DATA") STACK=(--data "$DATA") EQUAL+=(--data "$DATA"); fi
  IMAGES=(--task cifar --preset resnet18 --bf16 --fused) BERT=(--task bert --preset bert-base --bf16 --fused)
  GPT2=(--task gpt --preset gpt2 "${FAST[@]}" "${SIZE[@]}")
fi
for part in $PARTS; do
  case $part in [a-g]) ;; *) echo "gpu.sh: unknown part $part: a b c d e f g" >&2; exit 2 ;; esac
done
mkdir -p "$OUT/status" "$OUT/log" "$OUT/runs" || exit 2
OUT=$(cd "$OUT" && pwd)

# ---- a Python that has the package: as it is, else from this source tree, else in a virtual environment of its own

PY=
for candidate in ${PYTHON:+"$PYTHON"} "$ROOT/.venv/bin/python" "$OUT/venv/bin/python" python3; do
  if "$candidate" -c "import hybrid_predict_trainer" 2>/dev/null; then PY=$candidate; break; fi
done
if [ -z "$PY" ]; then
  export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"
  for candidate in ${PYTHON:+"$PYTHON"} python3; do
    if "$candidate" -c "import hybrid_predict_trainer" 2>/dev/null; then PY=$candidate; break; fi
  done
fi
if [ -z "$PY" ]; then
  echo "gpu.sh: installing the package into $OUT/venv"
  "${PYTHON:-python3}" -m venv --system-site-packages "$OUT/venv" &&
    "$OUT/venv/bin/python" -m pip install --quiet "$ROOT" || { echo "gpu.sh: could not install the package" >&2; exit 1; }
  PY=$OUT/venv/bin/python
fi
HPT=("$PY" -m hybrid_predict_trainer.cli)
MORE=("$PY" "$ROOT/benchmarks/parts.py")

# ---- units

STARTED=$(date +%s)
BAD=0

# whether a file holds a JSON value: one that was cut off by a crash is no result
is_json() { [ -s "$1" ] && "$PY" -c 'import json, sys; json.load(open(sys.argv[1]))' "$1" 2>/dev/null; }

# unit NAME required|optional COMMAND...: run unless its result is there; what it prints on standard output is the result.
# Optional units may refuse with status 2 (a preset or data set that does not exist here).
unit() {
  local name=$1 kind=$2 limit=$LIMIT_S log=$OUT/log/$1.log rc left began seconds
  shift 2
  if is_json "$OUT/$name.json"; then echo "$name: there already"; return; fi
  if [ "$BUDGET_S" -gt 0 ]; then
    left=$((BUDGET_S - ($(date +%s) - STARTED)))
    if [ "$left" -lt 15 ]; then echo "$name: no time left, call again to go on"; BAD=1; return; fi
    [ "$left" -lt "$limit" ] && limit=$left
  fi
  echo "$name: at most $limit s ..."
  rm -f "$OUT/$name.json"
  began=$(date +%s)
  timeout --kill-after=20 "$limit" "$@" >"$OUT/$name.part" 2>"$log" &
  CHILD=$!
  tail -n +1 -s 0.2 -f --pid="$CHILD" "$log" >&2 &
  wait "$CHILD"
  rc=$?
  CHILD=
  seconds=$(($(date +%s) - began))
  if [ "$rc" -eq 0 ] && ! is_json "$OUT/$name.part"; then rc=65; fi # it said it went well and printed no JSON
  if [ "$rc" -eq 0 ]; then mv "$OUT/$name.part" "$OUT/$name.json"; else rm -f "$OUT/$name.part"; fi
  if [ "$rc" -ne 0 ] && ! { [ "$kind" = optional ] && [ "$rc" -eq 2 ]; }; then BAD=1; fi
  "$PY" "$ROOT/benchmarks/record.py" "$name" "$kind" "$rc" "$seconds" "$limit" "$log" "$@" >"$OUT/status/$name.json"
}

# compare NAME required|optional SEED FLAGS...: one seed of a comparison, so that no unit is long
compare() {
  local name=$1 kind=$2 seed=$3
  shift 3
  unit "$name" "$kind" "${HPT[@]}" compare "$@" --device "$DEVICE" --steps "$STEPS" --seed "$seed" --seeds 1 \
    --overwrite --json --out "$OUT/runs/$name"
}

seeds() { seq 0 $((SEEDS - 1)); }
GPT=(--task gpt --preset "$PRESET" --batch-size "$BATCH" --context "$CONTEXT" "${FAST[@]}" "${SIZE[@]}")

part_a() { unit a-environment required "${MORE[@]}" environment --device "$DEVICE"; }

# The published protocol counts every accepted jump in full steps, which is the clock "claimed"; S stands beside it.
part_b() {
  for seed in $(seeds); do
    compare "b-acceptance-s$seed" required "$seed" "${GPT[@]}" --budgets 0.5 --set training.clock=claimed
  done
}

part_c() { for seed in $(seeds); do compare "c-lm-s$seed" required "$seed" "${GPT[@]}" --budgets 0.5,2; done; }

part_d() {
  unit d-overhead required "${HPT[@]}" bench overhead --json --device "$DEVICE" --preset "$PRESET" \
    --batch-size "$BATCH" --context "$CONTEXT" --steps "$PAIRS"
  unit d-accelerator required "${MORE[@]}" accelerator --device "$DEVICE" --preset "$PRESET" \
    --batch-size "$BATCH" --context "$CONTEXT" --pairs "$PAIRS"
}

part_e() {
  unit e-stack required "${MORE[@]}" stack --device "$DEVICE" --preset "$PRESET" --batch-size "$BATCH" \
    --context "$CONTEXT" --steps "$STACK_STEPS" --rounds "$ROUNDS" "${STACK[@]}"
}

part_f() {
  compare f-resnet18 optional 0 "${IMAGES[@]}" --budgets 0.5,2
  compare f-bert optional 0 "${BERT[@]}" --budgets 0.5,2
  compare f-gpt2 optional 0 "${GPT2[@]}" --budgets 0.5,2
}

# Three runs of equal wall-clock in one unit: 150 s each, and short ones before that say how long a step takes.
part_g() {
  unit g-equal-time required "${MORE[@]}" equal-time --device "$DEVICE" --preset "$PRESET" --batch-size "$BATCH" \
    --context "$CONTEXT" --seconds "$SECONDS_EACH" "${EQUAL[@]}"
}

# ---- all of it; whatever was started ends with the script

CHILD= WATCHER=
trap 'for p in $CHILD $WATCHER; do kill "$p" 2>/dev/null; done' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ "${DEVICE%%:*}" = cuda ] && command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used --format=csv -l 5 >>"$OUT/gpu.csv" 2>/dev/null &
  WATCHER=$!
fi

for part in $PARTS; do
  echo "== part $part"
  "part_$part"
done

# The judgement costs nothing and is made anew from whatever is there: more seeds, the stack's ratio, the memory.
if ls "$OUT"/b-acceptance-s*.json >/dev/null 2>&1; then
  echo "== acceptance"
  if "${MORE[@]}" acceptance "$OUT"/b-acceptance-s*.json --stack "$OUT/e-stack.json" --memory "$OUT/d-accelerator.json" \
    >"$OUT/acceptance.part"; then mv "$OUT/acceptance.part" "$OUT/acceptance.json"; else rm -f "$OUT/acceptance.part"; BAD=1; fi
fi
echo "results in $OUT"
exit $BAD
