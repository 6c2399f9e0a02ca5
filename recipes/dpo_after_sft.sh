#!/bin/sh
# DPO with LoRA over a model that was already tuned to answer. Without the adapter the model is its own reference, so no second
# model is loaded. beta 0.1 is the usual place to start: lower moves further from the reference.
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-Qwen/Qwen2.5-1.5B-Instruct}" template_name="${template_name:-auto}" loss=dpo \
    learning_rate="${learning_rate:-2e-5}" num_train_epochs="${num_train_epochs:-1}" output_dir="${output_dir:-outputs/dpo}" \
    exec sh run_orpo.sh --beta 0.1 --gradient_accumulation_steps 8 "$@"
