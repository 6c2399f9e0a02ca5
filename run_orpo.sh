#!/bin/sh
# Train a chat model on pairs of a chosen and a rejected answer.
#
#   sh run_orpo.sh                                          the starter model on the sample data, on this machine's GPU or CPU
#   model_name_or_path=Qwen/Qwen2.5-0.5B-Instruct template_name=auto train_file_dir=my_pairs sh run_orpo.sh
#   sh run_orpo.sh --max_steps 20 --learning_rate 5e-5      any further flag of orpo_train.py; --help lists them
#
# Edit the values below, or set them from outside as above. "auto" means: chosen from the hardware, and said at the start.
# What has no effect in a run is left out: lora_rank where use_peft=false. To set another flag of orpo_train.py here, add a line
# of its name; variables of your own take CAPITALS.
# Relative paths start at this file's folder.
# Several GPUs: torchrun/README.md.

# ---- the model
model_name_or_path="${model_name_or_path:-models/SmolLM2-135M-Instruct}"  # a folder or a hub id; the default is made on first use
tokenizer_name_or_path="${tokenizer_name_or_path:-}"   # empty: the model's own
template_name="${template_name:-qwen}"                 # ChatML; auto takes the model's own template: do that with other models
cache_dir="${cache_dir:-}"                             # empty: hub downloads in the hub's folder, prepared data in ./cache

# ---- the data: files, or folders read recursively; data/README.md lists the formats
train_file_dir="${train_file_dir:-data/train}"
dataset_name="${dataset_name:-}"                       # a hub dataset instead: owner/name or owner/name:config:split
validation_file_dir="${validation_file_dir-data/eval}" # empty: 5% of the training prompts are held out
max_train_samples="${max_train_samples:--1}"           # -1: all rows; a small number makes a quick trial
max_eval_samples="${max_eval_samples:--1}"
max_source_length="${max_source_length:-1024}"         # a pair is kept if prompt + answer fits in the sum of both lengths;
max_target_length="${max_target_length:-512}"          # longer pairs are dropped and listed in data_report.json

# ---- the objective
loss="${loss:-orpo}"                                   # orpo needs no SFT before it; dpo, simpo and 25 others (--help) start from a tuned model
orpo_beta="${orpo_beta:-auto}"                         # weight of the odds-ratio term, higher separates harder; auto: 1 below 0.5 B, else 0.1
nll_scope="${nll_scope:-auto}"                         # auto: sequence for orpo, as TRL and the authors' code; answer; answer_per_pair
engine="${engine:-packed}"                             # packed: fast and light; trl: TRL's trainers, for comparison

# ---- adapter or all weights
use_peft="${use_peft:-true}"                           # true: LoRA, an eighth of the memory; false: all weights
qlora="${qlora:-false}"                                # true: frozen weights in 4 bits (a GPU and bitsandbytes); 8 B fit in 12 GB
load_in_4bit="${load_in_4bit:-false}"                  # the same under its other name
target_modules="${target_modules:-all}"                # all linear layers, or a list: q_proj,v_proj
lora_rank="${lora_rank:-16}"                           # higher: more to learn with, more memory
lora_alpha="${lora_alpha:-32}"                         # the adapter's weight is lora_alpha / lora_rank
lora_dropout="${lora_dropout:-0}"                      # against overfitting; on a CPU it costs a third of the time

# ---- the run
dry_run="${dry_run:-false}"                            # true: seconds, no weights loaded: what the run would do, need and take
per_device_train_batch_size="${per_device_train_batch_size:-auto}"  # pairs per micro-batch: memory and speed
per_device_eval_batch_size="${per_device_eval_batch_size:-auto}"
gradient_accumulation_steps="${gradient_accumulation_steps:-auto}"  # auto: 8 pairs per optimizer step on each device
num_train_epochs="${num_train_epochs:-1}"              # more passes learn more and overfit: watch the evaluation
max_steps="${max_steps:--1}"                           # a number of steps instead of epochs; -1: epochs
learning_rate="${learning_rate:-auto}"                 # auto: by loss, adapter and size; the run says which and why (docs/training.md)
eval_steps="${eval_steps:-0}"                          # evaluate every that many steps; 0: before and after training only
save_steps="${save_steps:-0}"                          # checkpoint every that many steps; 0: the final model alone
resume="${resume:-auto}"                               # auto: resume an unfinished run in output_dir; never; or a checkpoint's folder
resume_anyway="${resume_anyway:-false}"                # true: also where settings, data or model have changed since
bf16="${bf16:-auto}"                                   # auto: where the hardware multiplies bfloat16
fp16="${fp16:-auto}"                                   # auto: on GPUs that have no bfloat16 (V100, T4, RTX 20)
gradient_checkpointing="${gradient_checkpointing:-false}"  # true: long rows on a small GPU; a third slower
watch="${watch:-false}"                                # true: the run live at http://127.0.0.1, in a browser of this machine
report_to="${report_to:-none}"                         # tensorboard, wandb, swanlab, trackio: nothing leaves this machine unless asked
seed="${seed:-42}"
do_train="${do_train:-true}"                           # false: only score the model on the evaluation files
do_eval="${do_eval:-true}"                             # false: no table before -> after
output_dir="${output_dir:-outputs/orpo}"               # an unfinished run there resumes from its checkpoint
overwrite_output_dir="${overwrite_output_dir:-false}"   # true: replace the result of a finished run in output_dir

# ------------------------------------------------------------------------------------------------------------------------------
set -eu
# The values above follow --defaults as they are: orpo_train.py checks them, leaves out what has no effect in this run, and
# takes a flag of the command line instead of them. With --config FILE the file stands in for them.
names=$(sed -n '/^set -eu/q; s/^\([a-z][a-z0-9_]*\)=.*/\1/p' "$0")
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
if [ -z "${TORCHRUN_ARGS:-}" ] || [ -z "${PYTHON:-}" ]; then # else torchrun/run_multi_node.sh has found it
    PYTHON=$(sh "$here/setup.sh") || exit 1
fi
cd "$here"

config=false
for word in "$@"; do
    case $word in --config | --config=*) config=true ;; esac
done
if [ "$config" = false ]; then
    set -- "$@" --defaults
    for name in $names; do # names of this file, not of the user
        eval "value=\$$name"
        [ -z "$value" ] || set -- "$@" "--$name=$value"
    done
fi
set -- orpo_train.py "$@"
if [ -n "${TORCHRUN_ARGS:-}" ]; then
    set -f # split at blanks, and no more
    # shellcheck disable=SC2086
    set -- torchrun/launch.py $TORCHRUN_ARGS "$@"
fi

quote() {
    case $1 in
    '' | *[!A-Za-z0-9_./,:=+-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
    esac
}
# On a terminal without what the top of this file adds; run.json of the run has every value.
# Nobody may be reading, or the disk be full: the run starts all the same.
(
    printf '+ %s' "$(quote "$PYTHON")"
    for word in "$@"; do
        if [ "$word" = --defaults ] && [ -t 1 ]; then
            printf ' --defaults ...'
            break
        fi
        printf ' %s' "$(quote "$word")"
    done
    printf '\n'
) 2>/dev/null || :
exec "$PYTHON" "$@"
