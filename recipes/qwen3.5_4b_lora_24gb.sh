#!/bin/sh
# Qwen3.5-4B, three of four layers of which carry a state (gated delta rule), with LoRA on one GPU of 24 GB.
# Prompts are shared in these layers too. On a GPU they are fast with two packages, which transformers finds by itself:
#   .venv/bin/pip install flash-linear-attention==0.6.0
#   .venv/bin/pip install causal-conv1d==1.7.0 --no-build-isolation     (needs nvcc)
# Without them the same numbers come from torch, much slower (transformers says so when the run starts).
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-Qwen/Qwen3.5-4B}" template_name="${template_name:-auto}" \
    lora_rank="${lora_rank:-16}" lora_alpha="${lora_alpha:-32}" learning_rate="${learning_rate:-1e-4}" gradient_checkpointing=true \
    max_source_length="${max_source_length:-1024}" max_target_length="${max_target_length:-1024}" \
    output_dir="${output_dir:-outputs/qwen3.5-4b-lora}" \
    exec sh run_orpo.sh --max_tokens_per_micro_batch 4096 --gradient_accumulation_steps 8 "$@"
