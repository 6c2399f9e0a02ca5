#!/bin/sh
# Qwen3-8B with frozen 4-bit weights on one GPU of 24 GB: pip install bitsandbytes into the environment first.
# Checkpointing and a small token budget leave room for pairs of 2,048 tokens.
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-Qwen/Qwen3-8B}" template_name="${template_name:-auto}" qlora=true \
    lora_rank="${lora_rank:-32}" lora_alpha="${lora_alpha:-64}" learning_rate="${learning_rate:-1e-4}" gradient_checkpointing=true \
    max_source_length="${max_source_length:-1024}" max_target_length="${max_target_length:-1024}" \
    output_dir="${output_dir:-outputs/qwen3-8b-qlora}" \
    exec sh run_orpo.sh --max_tokens_per_micro_batch 4096 --gradient_accumulation_steps 8 "$@"
