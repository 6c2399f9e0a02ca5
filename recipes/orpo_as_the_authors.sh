#!/bin/sh
# ORPO from a base model, without SFT before it, with the values of the authors' script for Mistral-7B on Capybara
# (github.com/xfactlab/orpo, scripts/run_mistral_orpo_capybara.sh): beta 0.05, learning rate 5e-6, inverse square root after
# 100 steps of warm-up, 3 epochs, 32 pairs a step on 4 GPUs. The paper's UltraFeedback models use beta 0.1.
# A base model has no chat template; the authors' models speak Zephyr's.
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-mistralai/Mistral-7B-v0.1}" template_name="${template_name:-zephyr}" \
    dataset_name="${dataset_name:-argilla/distilabel-capybara-dpo-7k-binarized}" validation_file_dir="${validation_file_dir-}" \
    use_peft=false orpo_beta="${orpo_beta:-0.05}" learning_rate="${learning_rate:-5e-6}" num_train_epochs="${num_train_epochs:-3}" \
    max_source_length=1792 max_target_length=256 per_device_train_batch_size=8 gradient_accumulation_steps=1 \
    gradient_checkpointing=true strategy=fsdp NPROC="${NPROC:-4}" output_dir="${output_dir:-outputs/mistral-orpo}" \
    exec sh torchrun/run_single_node.sh --lr_scheduler_type inverse_sqrt --warmup_steps 100 "$@"
