#!/bin/sh
# Everything that wants measuring on one NVIDIA GPU, in one command; it stops at the first wrong number.
#
#   PYTHON=python sh benchmarks/gpu_campaign.sh [FOLDER]
#
# FOLDER (gpu_campaign by default) gets a log and a JSON file for each part, and campaign.json with all of them;
# benchmarks/LOG.md and README.md take their figures from there. Needs torch with CUDA (2.11 or newer), transformers (5.17
# or newer), peft, trl, datasets and pytest; no network. Under ten minutes on an H100, on paper.
#
#   tests    1 min    the GPU tests: kernels and whole steps against double precision on the CPU, training against the CPU's
#   steps    2 min    one micro-batch of 0.5, 1.5 and 8 B shapes, eager and compiled: time, memory said and used, waits
#   engines  4 min    trl, packed and packed+compile side by side: random weights of 0.5, 1.5 and 8 B shapes with 152k
#                     words at 1,024 and 4,096 tokens, and the starter model where it is there
#   runs     2.5 min  run_orpo.sh with LoRA, all weights, compiled layers, float16 and QLoRA; killed and resumed; FSDP2
#
# PARTS="tests steps" runs some parts only. REHEARSE=1 runs all of it on a CPU with a tiny shape, a minute or two: whether
# these scripts work, and no figure of use. COMPILE=0 leaves out what is compiled.

set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
PYTHON="${PYTHON:-python}"
export PYTHON
folder="${1:-gpu_campaign}"
parts="${PARTS:-tests steps engines runs}"
rehearse="${REHEARSE:-0}"
compile="${COMPILE:-1}"
mkdir -p "$folder"
folder=$(CDPATH='' cd -- "$folder" && pwd)
cd "$here"
shapes="$folder/shapes"
starter=models/SmolLM2-135M-Instruct

if [ "$rehearse" = 1 ]; then
    device=cpu
    model=tiny
    "$PYTHON" benchmarks/gpu_shapes.py "$shapes" --shapes tiny --tokens 64,96 --weights tiny
else
    device=cuda
    model=qwen0.5b
    "$PYTHON" -c 'import torch; raise SystemExit(0 if torch.cuda.is_available() else "no CUDA device is here: nothing was measured (REHEARSE=1 rehearses on a CPU)")'
    "$PYTHON" benchmarks/gpu_shapes.py "$shapes" --shapes qwen0.5b,qwen1.5b,llama8b --tokens 1024,4096 --weights qwen0.5b
fi

# check NAME COMMAND...: runs it with a log, and stops the campaign with the log's end if it fails
check() {
    label="$1"
    shift
    printf '%s ... ' "$label"
    began=$(date +%s)
    if "$@" >"$folder/$label.log" 2>&1; then
        echo "ok, $(($(date +%s) - began)) s"
    else
        echo WRONG
        tail -n 30 "$folder/$label.log"
        exit 1
    fi
}

report() { "$PYTHON" benchmarks/gpu_report.py "$@"; }

step() { # MODEL LOAD PAIRS lora|full [--compile]
    name="step-$(basename "$1")-$2-$3-$4${5:+-compiled}"
    check "$name" "$PYTHON" benchmarks/gpu_step.py --model "$1" --load "$2" --pairs "$3" --peft "$4" ${5:+"$5"} \
        --device "$device" --json "$folder/$name.json"
}

engines() { # NAME MODEL DATA PAIRS BATCH LENGTH ENGINES OPTIONS...
    file="$folder/engines-$1.json"
    name="engines-$1" source="$2" data="$3" pairs="$4" batch="$5" length="$6" names="$7"
    shift 7
    check "$name" "$PYTHON" benchmarks/bench_engines.py --model "$source" --data "$data" --pairs "$pairs" \
        --batch "$batch" --max_length "$length" --engines "$names" --dtype bf16 --peft lora --json "$file" "$@"
    report engines "$file"
}

# orpo FOLDER FLAGS...: a short run with the defaults and these flags
orpo() {
    out="$1"
    shift
    env model_name_or_path="$shapes/$model" template_name=auto output_dir="$out" train_file_dir="$shapes/$short" \
        do_eval=false max_steps=8 sh run_orpo.sh --logging_steps 1 "$@"
}

run() { # NAME FLAGS...: one whose losses are finite
    name="$1"
    shift
    check "run-$name" orpo "$folder/run-$name" "$@"
    report curve "$folder/run-$name" --json "$folder/run-$name.json"
}

killed() { # NAME FLAGS...: one that is killed without warning after its first checkpoint
    printf 'run-%s, killed ... ' "$1"
    place="$folder/run-$1" log="$folder/run-$1-killed.log"
    shift
    rm -rf "$place"
    # exec all the way down: the process that is killed is the one that trains
    (
        exec env model_name_or_path="$shapes/$model" template_name=auto output_dir="$place" \
            train_file_dir="$shapes/$short" do_eval=false max_steps=8 sh run_orpo.sh --logging_steps 1 "$@"
    ) >"$log" 2>&1 &
    process=$!
    while [ ! -d "$place/checkpoint-2" ] && kill -0 "$process" 2>/dev/null; do sleep 0.1; done
    kill -9 "$process" 2>/dev/null || true
    wait "$process" 2>/dev/null || true
    if [ ! -d "$place/checkpoint-2" ] || [ -f "$place/all_results.json" ]; then
        echo "WRONG: it was to be killed between its first checkpoint and its end"
        tail -n 30 "$log"
        exit 1
    fi
    echo ok
}

for part in $parts; do
    case "$part" in
    tests) check tests "$PYTHON" -m pytest -q -n 0 -m gpu tests/engine/test_gpu.py ;;
    steps)
        if [ "$rehearse" = 1 ]; then
            step "$shapes/tiny" hh 2 lora
            step "$shapes/tiny" hh 2 full
            [ "$compile" = 0 ] || step "$shapes/tiny" hh 2 lora --compile
        else
            step qwen0.5b hh 8 lora
            step qwen0.5b hh 64 lora
            step qwen0.5b hh 64 full
            step qwen1.5b zh 16 lora
            step llama8b uf 8 lora
            step llama8b mt4k 2 lora
            [ "$compile" = 0 ] || step qwen0.5b hh 64 lora --compile
            [ "$compile" = 0 ] || step llama8b uf 8 lora --compile
        fi
        ;;
    engines)
        three=trl,packed
        [ "$compile" = 0 ] || three=trl,packed,compiled
        if [ "$rehearse" = 1 ]; then
            engines tiny-64 "$shapes/tiny" "$shapes/pairs-64.jsonl" 6 2 96 "$three" --random --apart
        else
            engines qwen0.5b-1024 "$shapes/qwen0.5b" "$shapes/pairs-1024.jsonl" 16 4 1200 "$three" --random
            engines qwen1.5b-1024 "$shapes/qwen1.5b" "$shapes/pairs-1024.jsonl" 16 4 1200 "$three" --random
            engines qwen1.5b-4096 "$shapes/qwen1.5b" "$shapes/pairs-4096.jsonl" 6 2 4200 "$three" --random --apart
            engines llama8b-1024 "$shapes/llama8b" "$shapes/pairs-1024.jsonl" 8 2 1200 trl,packed --random --apart
            engines llama8b-4096 "$shapes/llama8b" "$shapes/pairs-4096.jsonl" 4 1 4200 trl,packed --random --apart
            if [ -d "$starter" ]; then
                engines starter "$starter" data/train/en.jsonl 32 8 512 "$three"
            else
                echo "engines-starter: left out, $starter is not there"
            fi
        fi
        ;;
    runs)
        short="pairs-1024.jsonl"
        [ "$rehearse" = 0 ] || short="pairs-64.jsonl"
        run lora --use_peft true --save_steps 2
        killed resumed --use_peft true --save_steps 2
        run resumed --use_peft true --save_steps 2
        grep -q "resuming from" "$folder/run-resumed.log" || { echo "WRONG: run-resumed did not resume" && exit 1; }
        report same "$folder/run-lora" "$folder/run-resumed" --within 0.001 --json "$folder/kill-and-resume.json"
        run full --use_peft false
        run fp16 --use_peft true --fp16 true --bf16 false
        report same "$folder/run-lora" "$folder/run-fp16" --within 0.02 --json "$folder/fp16-against-bf16.json"
        [ "$compile" = 0 ] || run compiled --use_peft true --torch_compile true
        if [ "$device" = cuda ] && "$PYTHON" -c 'import bitsandbytes' 2>/dev/null; then
            run qlora --use_peft true --qlora true
        else
            echo "run-qlora: left out, it takes a GPU and bitsandbytes"
        fi
        check fsdp "$PYTHON" benchmarks/gpu_fsdp.py --model "$shapes/$model" --device "$device" --json "$folder/fsdp.json"
        ;;
    *)
        echo "PARTS knows tests, steps, engines and runs; got $part" >&2
        exit 2
        ;;
    esac
done

report table "$folder"
