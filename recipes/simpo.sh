#!/bin/sh
# SimPO after SFT: no reference, token means, a target margin. Of all knobs the learning rate matters most (3e-7 to 1e-6 for all
# weights in the paper; LoRA bears ten times that); then beta (2 to 2.5; up to 10 for Llama-3-Instruct) and gamma (0.3 to 0.5 of
# beta in the paper's terms, which is what simpo_gamma is: the margin in units of the loss).
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-Qwen/Qwen2.5-1.5B-Instruct}" template_name="${template_name:-auto}" loss=simpo \
    learning_rate="${learning_rate:-1e-5}" num_train_epochs="${num_train_epochs:-1}" output_dir="${output_dir:-outputs/simpo}" \
    exec sh run_orpo.sh --beta 2.0 --simpo_gamma 1.0 --gradient_accumulation_steps 16 "$@"
