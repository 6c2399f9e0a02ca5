#!/bin/sh
# Everything that wants measuring on one NVIDIA GPU, in one command; it stops at the first wrong number.
#
#   PYTHON=python sh benchmarks/gpu_campaign.sh [FOLDER]
#
# FOLDER (gpu_campaign by default) gets a JSON file and a log for each part; benchmarks/LOG.md and README.md take their
# figures from there. Needs torch with CUDA (2.11 or newer), transformers (5.17 or newer), peft, trl, datasets and pytest;
# no network. PARTS="tests steps" runs some parts only.
#
#   tests    the GPU tests: kernels and whole steps against double precision on the CPU, training against the CPU's
#   steps    one micro-batch of 0.5, 1.5 and 8 B shapes, eager and compiled, beside the dry run's memory
#   engines  engine=trl and engine=packed side by side on the starter model, if it is there
#   runs     a short run of run_orpo.sh with LoRA, one with all weights, and one with compiled layers

set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
PYTHON="${PYTHON:-python}"
folder="${1:-gpu_campaign}"
parts="${PARTS:-tests steps engines runs}"
mkdir -p "$folder"
folder=$(CDPATH='' cd -- "$folder" && pwd)
cd "$here"
starter=models/SmolLM2-135M-Instruct
sample=data/train/en.jsonl

"$PYTHON" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else "no CUDA device is here: nothing was measured")'

# check NAME COMMAND...: runs it with a log, and stops the campaign with the log's end if it fails
check() {
    name="$1"
    shift
    printf '%s ... ' "$name"
    if "$@" >"$folder/$name.log" 2>&1; then
        echo ok
    else
        echo WRONG
        tail -n 30 "$folder/$name.log"
        exit 1
    fi
}

step() { # MODEL LOAD PAIRS lora|full
    check "step-$1-$2-$3-$4" "$PYTHON" benchmarks/gpu_step.py --model "$1" --load "$2" --pairs "$3" --peft "$4" \
        --json "$folder/step-$1-$2-$3-$4.json"
    check "step-$1-$2-$3-$4-compiled" "$PYTHON" benchmarks/gpu_step.py --model "$1" --load "$2" --pairs "$3" --peft "$4" \
        --compile --json "$folder/step-$1-$2-$3-$4-compiled.json"
}

for part in $parts; do
    case "$part" in
    tests) check tests "$PYTHON" -m pytest -q -m gpu tests/engine/test_gpu.py ;;
    steps)
        step qwen0.5b hh 8 lora
        step qwen0.5b hh 64 lora
        step qwen0.5b hh 64 full
        step qwen1.5b zh 16 lora
        step llama8b uf 8 lora
        step llama8b mt4k 2 lora
        ;;
    engines)
        if [ -d "$starter" ]; then
            for peft in "" "--peft lora"; do
                # shellcheck disable=SC2086 # an option and its value, or nothing
                check "engines$(echo "$peft" | tr -d ' -')" "$PYTHON" benchmarks/bench_engines.py --model "$starter" \
                    --data "$sample" --pairs 32 --batch 8 --dtype bf16 --engines trl,packed $peft \
                    --json "$folder/engines$(echo "$peft" | tr -d ' -').json"
            done
        else
            echo "engines: left out, $starter is not there"
        fi
        ;;
    runs)
        check run-lora env output_dir="$folder/run-lora" use_peft=true sh run_orpo.sh --max_steps 6
        check run-full env output_dir="$folder/run-full" use_peft=false sh run_orpo.sh --max_steps 6
        check run-compiled env output_dir="$folder/run-compiled" sh run_orpo.sh --max_steps 6 --torch_compile true
        ;;
    *)
        echo "PARTS knows tests, steps, engines and runs; got $part" >&2
        exit 2
        ;;
    esac
done

"$PYTHON" - "$folder" <<'PY'
import json, pathlib, sys
rows = [json.loads(p.read_text()) | {"file": p.stem} for p in sorted(pathlib.Path(sys.argv[1]).glob("step-*.json"))]
print(f"{'step':<40}{'tokens':>8}{'ms':>9}{'host ms':>9}{'MFU':>7}{'GB':>8}{'said':>8}")
for r in rows:
    print(f"{r['file']:<40}{r['tokens']:>8}{r['ms']:>9.1f}{r['host_ms']:>9.1f}{r['mfu_of_h100']:>7.1%}"
          f"{r['peak_gb']:>8.2f}{r['estimated_peak_gb']:>8.2f}")
PY
