#!/bin/sh
# Chinese medical pairs (shibing624/medical, config reward: real doctors' replies over a model's) on one GPU.
# The rejected answers are often very short, so read the length bias in data_report.json before believing the accuracy.
# Download the three files reward/*.json of the dataset into data/medical_reward first; nothing is sent anywhere.
cd "$(dirname "$0")/.." || exit 1
model_name_or_path="${model_name_or_path:-Qwen/Qwen2.5-1.5B-Instruct}" template_name="${template_name:-auto}" \
    train_file_dir="${train_file_dir:-data/medical_reward/train.json}" \
    validation_file_dir="${validation_file_dir-data/medical_reward/valid.json}" nll_scope=answer \
    num_train_epochs="${num_train_epochs:-1}" output_dir="${output_dir:-outputs/medical-zh}" \
    exec sh run_orpo.sh --max_tokens_per_micro_batch 8192 "$@"
