#!/bin/sh
# Qwen2.5-0.5B-Instruct with LoRA on one GPU of 8 GB: the quickest real model, English and Chinese.
# The token budget bounds the memory, whatever the longest pair.
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-Qwen/Qwen2.5-0.5B-Instruct}" template_name="${template_name:-auto}" \
    output_dir="${output_dir:-outputs/qwen2.5-0.5b}" \
    exec sh run_orpo.sh --max_tokens_per_micro_batch 4096 --gradient_accumulation_steps 4 "$@"
