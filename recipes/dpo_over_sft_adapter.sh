#!/bin/sh
# SFT with LoRA, then preferences with LoRA: the SFT adapter is handed in as the model, and training goes on with it as it is (its
# rank, alpha and layers); the reference of DPO is the SFT model. `--new_adapter true --lora_rank 16` merges it instead and starts a
# new adapter over the merged weights; with qlora=true it stays below the new one, frozen. Where the adapter's own base has moved:
# model_name_or_path=BASE ... --adapter_name_or_path outputs/sft
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-outputs/sft}" template_name="${template_name:-auto}" loss=dpo \
    learning_rate="${learning_rate:-2e-5}" num_train_epochs="${num_train_epochs:-1}" output_dir="${output_dir:-outputs/dpo_over_sft}" \
    exec sh run_orpo.sh --beta 0.1 --gradient_accumulation_steps 8 "$@"
