#!/bin/bash
# What only a GPU can show, in at most 8 minutes: bench rows, training from JPEGs with the load sampled, tests.
#
#   benchmarks/gpu_check.sh OUT [--dry]
#
# --dry goes the same way on the CPU in small. Everything is written to OUT after every step, the most important
# step first, each under its own time limit; a step that fails or runs out of time does not end the others.
# PYTHON names another interpreter.
set -u
OUT=${1:?usage: benchmarks/gpu_check.sh OUT [--dry]}
DRY=${2:-}
PYTHON=${PYTHON:-python}
HERE=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export PYTHONPATH="$HERE/src${PYTHONPATH:+:$PYTHONPATH}"
cd "$HERE" || exit 1
failed=0

step() { # NAME SECONDS COMMAND...: its output goes to OUT/NAME.log, its end to OUT/steps.txt
	local name=$1 limit=$2 began code
	shift 2
	[ -n "$DRY" ] && limit=$((limit * 20)) # what it takes on a CPU says nothing
	began=$(date +%s)
	timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
	code=$?
	[ $code = 0 ] || failed=1
	echo "$name: exit code $code after $(($(date +%s) - began)) s of at most $limit" | tee -a "$OUT/steps.txt"
}

if [ -n "$DRY" ]; then
	backbone="embedded" device=cpu precision=32 images=24 tests=cpu size=60
	bench="--tasks 1 --batch 1,4 --images 20 --training-batch 4 --repeats 1"
else
	backbone="vit_base_patch16_224.augreg_in21k" device=cuda precision=bf16-mixed images=2000 tests=cuda size=500
	bench="--tasks 1,10,50 --batch 1,64 --images 600 --repeats 5"
fi

: >"$OUT/steps.txt"
"$PYTHON" -c 'import torch, os
print(torch.__version__, os.cpu_count(), "cores", torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")' |
	tee "$OUT/machine.txt"
# shellcheck disable=SC2086
step train 150 "$PYTHON" benchmarks/gpu_training.py --backbone $backbone --device $device --precision $precision \
	--images $images --width $size --out "$OUT"
# shellcheck disable=SC2086
step bench 130 "$PYTHON" -m duallora bench --backbone $backbone --methods lora,duallora,benchmarks/compare/duallora-own.yaml \
	$bench --device $device --precision $precision $([ -n "$DRY" ] || echo --compile) --out "$OUT/bench"
DUALLORA_GPU_TESTS=$tests step tests 190 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu \
	${DRY:+-k "ncm or duallora or batch or lora"}
exit $failed
