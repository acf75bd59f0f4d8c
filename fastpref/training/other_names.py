"""What other trainers (TRL, LLaMA-Factory, OpenRLHF, axolotl) call an option: ours, or what to do in its place."""

from __future__ import annotations

_NAMES = {
    "model": "model_name_or_path model_name base_model base_model_name_or_path pretrain pretrained model_path",
    "tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path",
    "chat_template": "template chat_template_path",
    "reference_model": "ref_model ref_model_name_or_path ref_pretrain reference_model_name_or_path",
    "lora_rank": "lora_r lora_dim use_lora use_peft finetuning_type adapter",
    "lora_target_modules": "lora_target lora_modules target_modules",
    "dataset": "dataset_name train_file train_data train_dataset data_path dataset_path data datasets",
    "eval_dataset": "eval_file eval_data validation_file val_file test_dataset test_datasets",
    "eval_fraction": "val_size val_set_size test_size validation_split",
    "max_length": "max_seq_length max_seq_len max_len max_prompt_length max_completion_length max_target_length "
    "cutoff_len sequence_len model_max_length",
    "loss": "loss_type pref_loss rl",
    "beta": "pref_beta dpo_beta rl_beta",
    "learning_rate": "lr actor_learning_rate peak_lr",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "warmup_steps": "num_warmup_steps lr_warmup_steps",
    "warmup_ratio": "lr_warmup_ratio",
    "weight_decay": "l2 wd",
    "adam_epsilon": "adam_eps eps",
    "max_grad_norm": "max_norm clip_grad grad_clip gradient_clipping",
    "batch_size": "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size micro_batch_size "
    "micro_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_acc accumulate_grad_batches",
    "epochs": "num_train_epochs num_epochs max_epochs n_epochs",
    "max_steps": "max_train_steps num_steps num_train_steps",
    "layout": "packing sample_packing packing_samples padding_free neat_packing",
    "attention": "attn_implementation flash_attn flash_attention flash_attention_2",
    "auto_batch": "auto_find_batch_size",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
    "offload_activations": "activation_offloading",
    "eval_every": "eval_steps evaluation_steps eval_strategy evaluation_strategy evals_per_epoch",
    "save_every": "save_steps save_strategy saves_per_epoch ckpt_every",
    "keep_checkpoints": "save_total_limit max_ckpt_num",
    "save_best": "load_best_model_at_end",
    "best_metric": "metric_for_best_model",
    "logging_every": "logging_steps log_steps log_every logging_strategy",
    "output_dir": "output out_dir save_path ckpt_path output_path",
    "resume": "resume_from_checkpoint load_checkpoint auto_resume_from_checkpoints",
}
_ADVICE = {
    "an option of the loss goes into loss_options, as '{\"lam\": 5.0}'": "lam lambda dpop_lambda label_smoothing gamma "
    "simpo_gamma tau alpha cpo_alpha delta margin_clip",
    "metrics.jsonl and TensorBoard events are always written, to output_dir: leave it out": "report_to log_with "
    "use_wandb use_tensorboard wandb_project run_name logging_dir",
    "reference log-probs are always computed once, before training; reference_cache keeps them between runs": (
        "precompute_ref_log_probs precompute_ref_batch_size"
    ),
    "the pairs of a step are batch_size * gradient_accumulation_steps on each process": (
        "train_batch_size global_batch_size"
    ),
    "evaluation takes the batch_size of training": "per_device_eval_batch_size eval_batch_size",
    "the optimiser is AdamW": "optim optimizer optimizer_type",
    "several processes are started by accelerate launch": "deepspeed fsdp zero_stage num_gpus num_processes ddp",
    "training and evaluation are always made, the latter with eval_dataset or eval_fraction": "do_train do_eval stage",
    "precision is fp32 or bf16 (autocast)": "bf16 fp16 tf32 mixed_precision torch_dtype dtype param_dtype",
    "adapters are trained without dropout": "lora_dropout",
    "no_progress hides the bars": "disable_tqdm",
    "quantised weights are not supported": "load_in_4bit load_in_8bit quantization_bit use_qlora",
}
OTHER_NAMES = {name: told for table in (_NAMES, _ADVICE) for told, names in table.items() for name in names.split()}
