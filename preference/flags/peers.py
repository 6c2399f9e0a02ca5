"""Names that users of TRL, LLaMA-Factory, ms-swift and axolotl type and for which no single flag stands here.

Each has what to do instead, or why there is none. A plain other name of a flag stands with the flag, as `peers`. None
of these may be the name of a flag.
"""

from __future__ import annotations

INSTEAD = {  # what to do -> names
    "a pair is kept if prompt + answer fits in max_source_length + max_target_length tokens; --truncate cuts":
        "cutoff_len max_length max_seq_length sequence_len model_max_length",
    "nothing to set, pairs are packed without padding (engine=packed)":
        "packing neat_packing sample_packing padding_free pad_to_multiple_of pad_to_sequence_len padding_value "
        "pad_token padding_side",
    "nothing to set, pairs are dealt to micro-batches by length, and the loss of a step does not depend on it":
        "group_by_length length_column_name train_sampling_strategy auto_find_batch_size",
    "--attn_implementation names an attention; unset, the packed engine chooses by device and model":
        "flash_attention use_flash_attn use_flash_attention_2 sdp_attention xformers_attention shift_attn",
    "nothing to set, the packed engine has its own head and kernels":
        "use_liger_kernel enable_liger_kernel liger_kernel_config use_liger_loss use_unsloth unsloth rope_scaling "
        "use_cache tf32 activation_offloading",
    "evaluations compute as training does: --bf16 or --fp16":
        "fp16_full_eval bf16_full_eval",
    "nothing to set, the reference is the model before training, computed once or by leaving the adapter out":
        "ref_model ref_model_name_or_path reference_model ref_adapter_name precompute_ref_log_probs sync_ref_model "
        "precompute_ref_batch_size force_use_ref_model",
    "nothing to set, rows are prepared once and kept under cache_dir; --dataloader_num_workers packs batches ahead":
        "dataset_num_proc preprocessing_num_workers dataset_processes overwrite_cache streaming dataset_streaming",
    "a hub dataset is written --dataset_name owner/name:config:split":
        "dataset_config dataset_split dataset_train_split dataset_test_split subset",
    "what ORPO's NLL counts is --nll_scope: sequence has the prompt, answer has not":
        "train_on_prompt mask_history train_on_inputs train_on_input",
    "it is the tracker's own: set its environment variable, such as WANDB_PROJECT":
        "wandb_project wandb_entity swanlab_project project logging_dir",
    "an adapter has --lora_rank, --lora_alpha, --lora_dropout, --target_modules and --use_dora":
        "lora_task_type lora_target_parameters freeze_trainable_layers use_badam",
    "there are 4 bits (--load_in_4bit) or none":
        "load_in_8bit quantization_method quant_method use_bnb_nested_quant",
    "there is none; --strategy shares a model out among processes (torchrun/README.md)":
        "sequence_parallel_size tensor_parallel_size pipeline_parallel_size context_parallel_size device_map "
        "parallelism_config accelerator_config",
    "it is --orpo_beta with loss=orpo, --beta with the others":
        "pref_beta rl_beta rlhf_beta",
    "there is none, its noise depends on the length of a row":
        "neftune_noise_alpha noisy_embedding_alpha",
    "--gradient_checkpointing true is all there is":
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
    "it is an argument of the schedule: --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs min_lr_rate=0.1":
        "lr_min min_lr min_lr_rate cosine_min_lr_ratio",
    "--simpo_gamma is the margin itself, in units of the loss":
        "gamma gamma_beta_ratio",
    "a row brings its own system text; where it has none the template's default is written":
        "system default_system",
    "dropout is as the model and --lora_dropout have it":
        "disable_dropout",
    "--sample_answers is the number of answers that are written before and after training":
        "generate_during_eval do_predict predict_with_generate",
    "--optim galore_adamw takes --optim_args rank=128 and --optim_target_modules":
        "use_galore use_apollo",
    "--loss takes a weighted sum too: dpo:0.8,bco_pair:0.2":
        "loss_weights use_weighting",
    "nothing to set, the loop has transformers' default there":
        "full_determinism local_rank average_tokens_across_devices router_aux_loss_coef debug disable_tqdm label_names "
        "remove_unused_columns torch_empty_cache_steps prediction_loss_only batch_eval_metrics",
}  # fmt: skip
ELSEWHERE = {name: said for said, names in INSTEAD.items() for name in names.split()}

_LOOP = "there is none, the loop has transformers' default there"
_SHARED = "there is none; --strategy shares a model out among processes (torchrun/README.md)"
_TRACKER = "it is the tracker's own: set its environment variable, such as WANDB_PROJECT"
BEGINNINGS = {
    "hub_": "nothing is uploaded; `hf upload OWNER/NAME output_dir` does it afterwards",
    "push_to": "nothing is uploaded; `hf upload OWNER/NAME output_dir` does it afterwards",
    "adam_": "there is none, AdamW has transformers' betas 0.9 and 0.999 and epsilon 1e-8",
    "ref_model_": "nothing to set, the reference is the model before training",
    "bnb_4bit_": "there is --load_in_4bit alone, which is NF4",
    "torch_compile_": "there is --torch_compile alone",
    "dataset_": "data are --train_file_dir and --validation_file_dir, or --dataset_name (data/README.md)",
    "model_": "a model is --model_name_or_path, with --torch_dtype and --trust_remote_code",
    **dict.fromkeys(("ddp_", "fsdp_", "deepspeed_"), _SHARED),
    **dict.fromkeys(("trackio_", "wandb_", "swanlab_"), _TRACKER),
    **dict.fromkeys(("dataloader_", "logging_", "log_", "eval_", "save_", "include_", "ignore_", "skip_"), _LOOP),
}


def elsewhere(name: str) -> str | None:
    """What to do instead of setting `name`, as far as its beginning tells."""
    return next((said for head, said in BEGINNINGS.items() if name.startswith(head)), None)
