"""Groups the keys of a TRL configuration (`bdpo train`) by the side effects that they cause.

Commands that do not train (`bdpo mi`, `bdpo recipes check --run`) remove such keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.settings import RECIPE, BDPOSettings


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Keys that make TRL upload models to the hub.
PUSHES = _words("""
    hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token push_to_hub
""")

#: Keys that make it report a run to a tracker.
REPORTS = _words("""
    project report_to run_name trackio_bucket_id trackio_space_id trackio_static_space_id
""")

#: Keys that make it continue an earlier run.
RESUMES = _words("""
    ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint
""")

#: Keys that distribute a model over processes. Removed by commands that run in one process.
SHARES = _words("""
    deepspeed fsdp fsdp_config parallelism_config
""")

#: Keys of output folders -> their names in the temporary folder of a command.
WRITES = {"output_dir": "run"}

#: All other keys of the tested releases of TRL and transformers. A test fails if a new release has
#: a key that is in none of these lists.
OTHERS = _words("""
    accelerator_config activation_checkpointing activation_checkpointing_kwargs
    activation_offloading adam_beta1 adam_beta2 adam_epsilon attn_implementation
    auto_find_batch_size average_tokens_across_devices batch_eval_metrics beta bf16 bf16_full_eval
    bnb_4bit_quant_storage bnb_4bit_quant_type data_seed dataloader_drop_last dataloader_in_order
    dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_pin_memory dataloader_prefetch_factor dataset_config dataset_name dataset_num_proc
    dataset_streaming dataset_test_split dataset_train_split datasets ddp_backend
    ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
    debug disable_dropout disable_tqdm discopop_tau do_eval do_predict do_train dtype
    enable_jit_checkpoint eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start
    eval_steps eval_strategy eval_use_gather_object f_alpha_divergence_coef f_divergence_type fp16
    fp16_full_eval full_determinism gradient_accumulation_steps gradient_checkpointing
    gradient_checkpointing_kwargs greater_is_better ignore_bias_buffers include_for_metrics
    include_num_input_tokens_seen label_names label_smoothing label_smoothing_factor ld_alpha
    learning_rate length_column_name liger_kernel_config load_best_model_at_end load_in_4bit
    load_in_8bit local_rank log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy lora_alpha lora_dropout
    lora_modules_to_save lora_r lora_target_modules lora_target_parameters lora_task_type loss_type
    loss_weights lr_scheduler_kwargs lr_scheduler_type max_grad_norm max_length max_steps
    metric_for_best_model model_init_kwargs model_name_or_path model_revision neftune_noise_alpha
    num_train_epochs optim optim_args optim_target_modules pad_to_multiple_of pad_token
    padding_free per_device_eval_batch_size per_device_train_batch_size precompute_ref_batch_size
    precompute_ref_log_probs prediction_loss_only ref_model_mixup_alpha ref_model_sync_steps
    remove_unused_columns router_aux_loss_coef save_on_each_node save_only_model save_steps
    save_strategy save_total_limit seed skip_memory_metrics streaming sync_ref_model
    test_split_size tf32 torch_compile torch_compile_backend torch_compile_mode
    torch_empty_cache_steps train_sampling_strategy truncation_mode trust_remote_code
    use_bnb_nested_quant use_cache use_cpu use_dora use_liger_kernel use_peft use_rslora
    use_weighting warmup_steps weight_decay
""")

#: Keys that a command which does not train removes. `env` sets environment variables, by which
#: libraries report too.
DROPPED = PUSHES | REPORTS | RESUMES | {"env"}
#: All keys that `bdpo train` knows, except those of B-DPO.
KEYS = DROPPED | SHARES | OTHERS | WRITES.keys()


def for_sharing(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that others need to run it again.

    Args:
        keys: the configuration, as the YAML file has it.
    """
    needed = (KEYS - DROPPED).union(BDPOSettings.keys(), (RECIPE,))
    return {key: value for key, value in keys.items() if key in needed}


def without_side_effects(keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a configuration without side effects that writes into a temporary folder.

    Unknown keys stay, so that they are refused.

    Args:
        keys: the configuration, as the YAML file has it.
        folder: the temporary folder.
    """
    kept = {key: value for key, value in keys.items() if key not in DROPPED}
    kept |= {key: str(folder / name) for key, name in WRITES.items()}
    return kept | {"report_to": "none"}
