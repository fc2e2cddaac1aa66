"""Groups the keys of a LLaMA-Factory configuration by the side effects that they cause.

Commands that do not train (`bdpo doctor`, `bdpo mi`, `bdpo recipes check --run`) remove such keys.
Standard library only, so that a configuration can be read where LLaMA-Factory is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdpo_plugin.settings import RECIPE, BDPOSettings


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Keys that make LLaMA-Factory upload models to the hub.
PUSHES = _words("""
    export_hub_model_id hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token push_to_hub
""")

#: Keys that make it report a run to a tracker, local or remote.
REPORTS = _words("""
    logging_dir plot_loss project report_to run_name swanlab_api_key swanlab_lark_secret
    swanlab_lark_webhook_url swanlab_logdir swanlab_mode swanlab_project swanlab_run_name
    swanlab_workspace trackio_bucket_id trackio_space_id trackio_static_space_id use_swanlab
""")

#: Keys that make it write profiles of time and memory.
PROFILES = _words("""
    enable_torch_profiler profile_modules profiler_active_steps profiler_output_dir
    profiler_profile_memory profiler_record_shapes profiler_repeat profiler_wait_steps
    profiler_warmup_steps profiler_with_stack
""")

#: Keys that make it continue an earlier run.
RESUMES = _words("""
    ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint
""")

#: Keys that make it start other programs or use other machines.
SERVES = _words("""
    master_addr master_port ray_init_kwargs ray_num_workers
""")

#: Keys about saving into `output_dir`. They are kept, as that folder is replaced (:data:`WRITES`).
SAVES = _words("""
    enable_jit_checkpoint load_best_model_at_end overwrite_output_dir save_on_each_node
    save_only_model save_steps save_strategy save_total_limit
""")

#: Keys of `llamafactory-cli export`, which training ignores.
EXPORTS = _words("""
    export_device export_dir export_legacy_format export_quantization_bit
    export_quantization_dataset export_quantization_maxlen export_quantization_nsamples
    export_size
""")

#: Keys that distribute a model over processes. Removed by commands that run in one process.
SHARES = _words("""
    deepspeed fsdp fsdp_config
""")

#: Keys of output folders -> their names in the temporary folder of a command.
WRITES = {
    "output_dir": "run",
    "offload_folder": "offload",
    "tokenized_path": "tokenized",
}

#: All other keys of LLaMA-Factory's arguments. A test that runs with the host fails if a new
#: release has a key that is in none of these lists.
OTHERS = _words("""
    accelerator_config adam_beta1 adam_beta2 adam_epsilon adapter_folder adapter_name_or_path
    add_special_tokens add_tokens additional_target apollo_layerwise apollo_proj apollo_proj_type
    apollo_rank apollo_scale apollo_scale_front apollo_scale_type apollo_target
    apollo_update_interval asft_alpha audio_sampling_rate auto_find_batch_size
    average_tokens_across_devices badam_mask_mode badam_mode badam_start_block
    badam_switch_interval badam_switch_mode badam_update_ratio badam_verbose batch_eval_metrics
    bf16 bf16_full_eval buffer_size cache_dir compute_accuracy create_new_adapter crop_to_patches
    cutoff_len data_seed data_shared_file_system dataloader_drop_last dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor dataset
    dataset_dir ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
    ddp_static_graph ddp_timeout debug default_system disable_gradient_checkpointing
    disable_shuffling disable_tqdm do_eval do_predict do_sample do_train double_quantization
    dpo_label_smoothing eaft_alpha early_stopping_steps enable_liger_kernel enable_thinking
    eval_accumulation_steps eval_dataset eval_delay eval_do_concat_batches eval_num_beams
    eval_on_each_dataset eval_on_start eval_steps eval_strategy eval_use_gather_object
    finetuning_type flash_attn fp16 fp16_full_eval fp8 fp8_backend
    fp8_enable_fsdp_float8_all_gather freeze_extra_modules freeze_language_model
    freeze_multi_modal_projector freeze_trainable_layers freeze_trainable_modules
    freeze_vision_tower full_determinism galore_layerwise galore_proj_type galore_rank
    galore_scale galore_target galore_update_interval generation_config generation_max_length
    generation_num_beams gradient_accumulation_steps gradient_checkpointing
    gradient_checkpointing_kwargs greater_is_better hf_hub_token hyper_parallel_args
    ignore_pad_token_for_loss image_do_pan_and_scan image_max_pixels image_min_pixels
    include_effective_tokens_per_second include_for_metrics include_num_input_tokens_seen
    infer_backend infer_dtype init_special_tokens interleave_probs kt_expert_checkpoint_path
    kt_lora_expert_intermediate_size kt_lora_expert_num kt_use_lora_experts kt_weight_path
    kto_chosen_weight kto_rejected_weight label_names label_smoothing_factor ld_alpha
    learning_rate length_column_name length_penalty liger_kernel_config local_rank log_level
    log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps
    logging_strategy lora_alpha lora_dropout lora_rank lora_target loraplus_lr_embedding
    loraplus_lr_ratio low_cpu_mem_usage lr_scheduler_kwargs lr_scheduler_type mask_history
    max_grad_norm max_length max_new_tokens max_samples max_steps media_dir metric_for_best_model
    mix_strategy mixture_of_depths model_name_or_path model_revision module_dropout
    moe_aux_loss_coef ms_hub_token neat_packing neftune_noise_alpha new_special_tokens_config
    num_beams num_train_epochs oft_block_size oft_rank oft_target om_hub_token optim optim_args
    optim_target_modules overwrite_cache packing parallelism_config per_device_eval_batch_size
    per_device_train_batch_size pissa_convert pissa_init pissa_iter ppo_buffer_size ppo_epochs
    ppo_score_norm ppo_target ppo_whiten_rewards predict_with_generate prediction_loss_only
    pref_bco_weight pref_beta pref_ftx pref_loss preprocessing_batch_size
    preprocessing_num_workers preserve_thinking print_param_status pure_bf16 quantization_bit
    quantization_device_map quantization_method quantization_type ref_model ref_model_adapters
    ref_model_quantization_bit remove_unused_columns repetition_penalty resize_vocab reward_model
    reward_model_adapters reward_model_quantization_bit reward_model_type rope_scaling seed
    sglang_config sglang_lora_backend sglang_maxlen sglang_mem_fraction sglang_tp_size shift_attn
    simpo_gamma skip_memory_metrics skip_special_tokens sortish_sampler split_special_tokens stage
    streaming temperature template tf32 tool_format top_k top_p torch_compile
    torch_compile_backend torch_compile_mode torch_empty_cache_steps train_from_scratch
    train_on_prompt train_sampling_strategy trust_remote_code upcast_layernorm
    upcast_lmhead_output use_adam_mini use_apollo use_asft_loss use_audio_in_video use_badam
    use_cache use_cpu use_dft_loss use_dora use_eaft_loss use_fast_tokenizer use_galore
    use_hyper_parallel use_kt use_kv_cache use_liger_kernel use_llama_pro use_mca use_muon
    use_reentrant_gc use_rslora use_unsloth use_unsloth_gc use_v1_kernels val_size video_fps
    video_max_pixels video_maxlen video_min_pixels vllm_config vllm_enforce_eager vllm_gpu_util
    vllm_max_lora_rank vllm_maxlen warmup_ratio warmup_steps weight_decay
""")

#: Keys that a command which does not train removes.
DROPPED = PUSHES | REPORTS | PROFILES | RESUMES | SERVES | EXPORTS
#: All keys that LLaMA-Factory knows, except those of B-DPO.
KEYS = DROPPED | SAVES | SHARES | OTHERS | WRITES.keys()


#: Keys that hold a user's login tokens for a hub.
_LOGINS = ("hf_hub_token", "ms_hub_token", "om_hub_token")


def for_sharing(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the part of a configuration that others need to run it again.

    These are the keys that LLaMA-Factory and B-DPO know, without those that have side effects.

    Args:
        keys: the configuration, as the YAML file has it.
    """
    needed = (KEYS - DROPPED).difference(_LOGINS).union(BDPOSettings.keys(), (RECIPE,))
    return {key: value for key, value in keys.items() if key in needed}


def without_side_effects(keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns a configuration without side effects that writes into a temporary folder.

    Unknown keys stay, so that LLaMA-Factory refuses them.

    Args:
        keys: the configuration, as the YAML file has it.
        folder: the temporary folder.
    """
    kept = {key: value for key, value in keys.items() if key not in DROPPED}
    kept |= {key: str(folder / name) for key, name in WRITES.items()}
    del kept["tokenized_path"]
    if (path := tokenised_data(keys)) is not None:
        kept["tokenized_path"] = path  # existing data is only read
    return kept | {"report_to": "none", "overwrite_output_dir": True}


def tokenised_data(keys: Mapping[str, Any]) -> str | None:
    """Returns the `tokenized_path` of a configuration if that folder has data, else None.

    If it has, training reads that data and ignores the other keys about data. If not, training
    would write it."""
    path = keys.get("tokenized_path")
    if path is None or not Path(path).is_dir() or not any(Path(path).iterdir()):
        return None
    return str(path)
