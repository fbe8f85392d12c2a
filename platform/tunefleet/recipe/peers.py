"""Keys of LLaMA-Factory 0.9.5 and of transformers' trainer that this platform does not have.

None is dropped in silence. A key without meaning here is accepted with a notice. A key that would change the result is
refused with its mend, unless its value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tunefleet.recipe.problems import Problem, shown

_WITHOUT_MEANING: Mapping[str, str] = {
    "rows are tokenised by a pipeline of its own": "preprocessing_batch_size data_shared_file_system buffer_size",
    "the platform reduces gradients itself": "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend average_tokens_across_devices",
    "Ray places and connects the workers": "master_addr master_port local_rank save_on_each_node log_on_each_node",
    "tokenizers and weights are always loaded in the fast way": "use_fast_tokenizer low_cpu_mem_usage offload_folder "
    "device_map",
    "batches are laid out by the platform": "dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order remove_unused_columns "
    "label_names length_column_name",
    "the loss is computed in chunks at supervised positions already": "enable_liger_kernel use_liger_kernel "
    "liger_kernel_config",
    "activations are computed again in one exact way": "use_reentrant_gc gradient_checkpointing_kwargs "
    "activation_checkpointing_kwargs",
    "metrics have one form here": "logging_dir logging_strategy logging_first_step logging_nan_inf_filter log_level "
    "log_level_replica disable_tqdm run_name project include_num_input_tokens_seen include_tokens_per_second "
    "include_effective_tokens_per_second print_param_status skip_memory_metrics",
    "evaluation computes the loss only": "eval_accumulation_steps batch_eval_metrics prediction_loss_only "
    "eval_do_concat_batches eval_use_gather_object include_for_metrics greater_is_better",
    "images, video and sound are not read": "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan "
    "crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate "
    "freeze_vision_tower freeze_multi_modal_projector",
    "training does not generate": "do_sample temperature top_p top_k num_beams max_new_tokens repetition_penalty "
    "length_penalty skip_special_tokens eval_num_beams generation_max_length generation_num_beams generation_config "
    "infer_backend infer_dtype use_kv_cache use_cache",
    "`tunefleet export` has arguments of its own": "export_size export_device export_legacy_format",
}
IGNORED: Mapping[str, str] = {key: reason for reason, keys in _WITHOUT_MEANING.items() for key in keys.split()}
"""Key -> why it has no meaning here."""


@dataclass(frozen=True)
class Refusal:
    """A key that is refused unless its value asks for nothing."""

    nothing: tuple[object, ...]
    what: str
    mend: str


def _refused(nothing: tuple[object, ...], what: str, mend: str, keys: str) -> Iterable[tuple[str, Refusal]]:
    return ((key, Refusal(nothing, what, mend)) for key in keys.split())


_OFF: tuple[object, ...] = (False, None, "", "no")
_NEVER: tuple[object, ...] = ()
_REMOVE = "remove it"

REFUSED: Mapping[str, Refusal] = dict(
    [
        *_refused(
            _OFF,
            "LLaMA-Pro's block expansion is not supported",
            "expand the model beforehand and name its new layers: finetuning_type: freeze with "
            "freeze_trainable_layer_ids: [3, 7]",
            "use_llama_pro",
        ),
        *_refused(
            (None,),
            "quantised base models are not supported",
            "remove quantization_bit and train with pure_bf16: true to save memory",
            "quantization_bit",
        ),
        *_refused(
            _NEVER,
            "quantised base models are not supported",
            _REMOVE,
            "quantization_method quantization_type double_quantization quantization_device_map "
            "export_quantization_bit export_quantization_dataset export_quantization_nsamples "
            "export_quantization_maxlen",
        ),
        *_refused(
            _OFF,
            "this optimizer is not supported",
            "remove it and write optim: adamw_torch",
            "use_apollo use_adam_mini use_muon optim_args optim_target_modules adafactor",
        ),
        *_refused(
            _NEVER,
            "APOLLO is not supported",
            _REMOVE,
            "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
            "apollo_scale_type apollo_layerwise apollo_scale_front",
        ),
        *_refused(
            _NEVER,
            "OFT is not supported",
            "remove it and write finetuning_type: lora",
            "module_dropout oft_rank oft_block_size oft_target",
        ),
        *_refused(
            _NEVER,
            "preference and reward training are not supported",
            "remove it: the stages are sft and pt",
            "pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing kto_chosen_weight kto_rejected_weight "
            "simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards ref_model "
            "ref_model_adapters ref_model_quantization_bit reward_model reward_model_adapters "
            "reward_model_quantization_bit reward_model_type ld_alpha",
        ),
        *_refused(
            (*_OFF, 0.0),
            "the loss is plain cross entropy over the target tokens",
            _REMOVE,
            "use_dft_loss use_asft_loss asft_alpha use_eaft_loss eaft_alpha label_smoothing_factor moe_aux_loss_coef "
            "neftune_noise_alpha",
        ),
        *_refused(
            _OFF,
            "rows are read whole, and memory-mapped after tokenising",
            "remove it; max_samples takes fewer rows of each data set",
            "streaming",
        ),
        *_refused(
            (None, "concat"),
            "data sets are laid one after the other and shuffled together",
            _REMOVE,
            "mix_strategy interleave_probs",
        ),
        *_refused(_OFF, "the data sets of an evaluation count as one", _REMOVE, "eval_on_each_dataset"),
        *_refused(
            _OFF,
            "the template decides this",
            "write it into the tokenizer's chat template",
            "tool_format default_system preserve_thinking split_special_tokens",
        ),
        *_refused(
            (True, None), "the template decides this", "write it into the tokenizer's chat template", "enable_thinking"
        ),
        *_refused((True,), "padding never counts in the loss", _REMOVE, "ignore_pad_token_for_loss"),
        *_refused(
            _OFF,
            "the vocabulary stays as the model has it",
            "add the tokens to model and tokenizer beforehand",
            "resize_vocab add_tokens add_special_tokens new_special_tokens_config",
        ),
        *_refused(_NEVER, "the vocabulary stays as the model has it", _REMOVE, "init_special_tokens"),
        *_refused(
            (None, "main"), "the newest revision is loaded", "download that one and name its folder", "model_revision"
        ),
        *_refused(
            _NEVER, "secrets do not belong into a recipe", "remove it and set HF_TOKEN", "hf_hub_token hub_token"
        ),
        *_refused(
            _NEVER, "this hub is not supported", "remove it and name a local folder", "ms_hub_token om_hub_token"
        ),
        *_refused(
            _OFF,
            "the model is trained as it is",
            _REMOVE,
            "rope_scaling shift_attn mixture_of_depths use_unsloth use_unsloth_gc use_v1_kernels block_diag_attn "
            "freeze_language_model model_max_length activation_checkpointing torch_compile torch_compile_backend "
            "torch_compile_mode adapter_folder",
        ),
        *_refused(
            _OFF,
            "weights are always loaded",
            "make a folder with fresh weights and name it in model_name_or_path",
            "train_from_scratch",
        ),
        *_refused(
            _OFF,
            "number formats follow from bf16, fp16 and pure_bf16",
            "remove it",
            "upcast_layernorm upcast_lmhead_output compute_dtype fp8 fp8_enable_fsdp_float8_all_gather bf16_full_eval "
            "fp16_full_eval half_precision_backend",
        ),
        *_refused(_NEVER, "fp8 is not supported", "remove it and write bf16: true", "fp8_backend"),
        *_refused(_OFF, "FSDP has a key of its own", "remove it and write sharding: fsdp2", "fsdp fsdp_config"),
        *_refused(
            _OFF,
            "this engine is not supported",
            "remove it; ray_num_workers sets the data parallelism",
            "use_mca use_hyper_parallel hyper_parallel_args accelerator_config parallelism_config "
            "use_kt "
            "kt_weight_path "
            "kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
            "kt_lora_expert_intermediate_size auto_find_batch_size use_cpu no_cuda",
        ),
        *_refused(
            (*_OFF, 0, "random"),
            "the order of the rows follows from seed and data alone",
            "remove it; data_seed gives another order",
            "disable_shuffling group_by_length train_sampling_strategy dataloader_drop_last ignore_data_skip "
            "sortish_sampler full_determinism",
        ),
        *_refused(
            (*_OFF, 0),
            "evaluation computes the loss only",
            "remove it; metrics.jsonl holds eval_loss",
            "compute_accuracy predict_with_generate do_predict early_stopping_steps eval_delay",
        ),
        *_refused((None, {}), "schedules have no further arguments", "remove it", "lr_scheduler_kwargs"),
        *_refused(
            _OFF,
            "nothing is published",
            "remove it and upload output_dir afterwards",
            "push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision export_hub_model_id",
        ),
        *_refused(_OFF, "`tunefleet export` writes folders", "remove it and run that command", "export_dir"),
        *_refused(
            _OFF,
            "this tracker is not there yet",
            "remove it and write report_to: tensorboard, mlflow or wandb",
            "use_swanlab trackio_space_id trackio_bucket_id trackio_static_space_id",
        ),
        *_refused(
            _NEVER,
            "this tracker is not there yet",
            "remove it and write report_to: tensorboard, mlflow or wandb",
            "swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir "
            "swanlab_lark_webhook_url swanlab_lark_secret",
        ),
        *_refused(
            (*_OFF, 0),
            "profiling is not part of a run",
            _REMOVE,
            "enable_torch_profiler profiler_output_dir profile_modules debug torch_empty_cache_steps "
            "enable_jit_checkpoint restore_callback_states_from_checkpoint",
        ),
        *_refused(
            _NEVER,
            "profiling is not part of a run",
            _REMOVE,
            "profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes "
            "profiler_profile_memory profiler_with_stack",
        ),
        *_refused(
            _NEVER,
            "this serves models, which training does not",
            _REMOVE,
            "vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen "
            "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
        ),
        *_refused(_NEVER, "that name is gone from transformers", "write eval_strategy", "evaluation_strategy"),
        *_refused(_NEVER, "asks for a search", "give the recipe to `tunefleet tune`, or remove it", "tune"),
    ]
)
"""Key -> why it is refused and what to write instead. Values are never shown: some are secrets."""


def judge(key: str, value: object) -> Problem | str | None:
    """What becomes of a peer's key: a problem, a notice, or None if it is not one."""
    if key in IGNORED:
        return f"{key}: accepted and not used, because {IGNORED[key]}"
    refusal = REFUSED.get(key)
    if refusal is None:
        return None
    if any(type(value) is type(off) and value == off for off in refusal.nothing):
        return f"{key}: {shown(value)} asks for nothing and is not used here"
    return Problem(key, refusal.what, refusal.mend)
