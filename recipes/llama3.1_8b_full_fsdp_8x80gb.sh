#!/bin/sh
# Llama-3.1-8B-Instruct, all weights, sharded over 8 GPUs of 80 GB: float32 weights, gradients and AdamW take 16 bytes a
# parameter, 128 GB in all, 16 GB a GPU; the rest is for activations.
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-meta-llama/Llama-3.1-8B-Instruct}" template_name="${template_name:-auto}" \
    use_peft=false learning_rate="${learning_rate:-5e-6}" gradient_checkpointing=true strategy=fsdp NPROC="${NPROC:-8}" \
    per_device_train_batch_size=4 gradient_accumulation_steps=2 output_dir="${output_dir:-outputs/llama3.1-8b}" \
    exec sh torchrun/run_single_node.sh "$@"
