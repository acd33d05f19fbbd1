"""The seams: functions and classes of Megatron that this package calls or extends, with the parameters that it uses.

`fdd doctor` compares them with the installed Megatron, and `docs/megatron.md` shows them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Seam:
    """A function or a class of Megatron.

    Attributes:
        name: dotted name.
        parameters: parameters that we give or read by name.
        purpose: what we use it for.
        where: our files that use it, below `megatron_fdd/`.
        breaks: what no longer works if the seam or one of the parameters is gone.
    """

    name: str
    parameters: tuple[str, ...]
    purpose: str
    where: tuple[str, ...]
    breaks: str


_CORE, _TRAINING = "megatron.core", "megatron.training"
_OWN_LAYERS = "models with layers of their own"
_SCHEDULES = f"{_CORE}.pipeline_parallel.schedules"
_CHECKPOINT = f"{_CORE}.dist_checkpointing"
_SCHEDULE = ("data_iterator", "num_microbatches", "seq_length", "micro_batch_size", "forward_only")

SEAMS: tuple[Seam, ...] = (
    Seam(
        f"{_CORE}.models.gpt.GPTModel.forward",
        ("packed_seq_params", "extra_block_kwargs", "output_processor"),
        "hidden states of inner layers come out, and the loss is computed in place of logits",
        ("step/taps.py",),
        "no tap and no loss: nothing can be distilled",
    ),
    Seam(
        f"{_CORE}.transformer.transformer_block.TransformerBlock.forward",
        ("extract_layer_indices",),
        "which layers are tapped, by global index from 0",
        ("step/taps.py",),
        "no taps",
    ),
    Seam(
        f"{_CORE}.transformer.transformer_block.TransformerBlock.set_input_tensor",
        ("input_tensor",),
        "what a stage receives: the carry is split off before the decoder sees it",
        ("step/student.py",),
        "pipelines with a delta across stages",
    ),
    Seam(
        f"{_CORE}.models.gpt.GPTModel.shared_embedding_or_output_weight",
        (),
        "the head of a model with tied embeddings",
        ("step/lens.py", "step/trained_lens.py"),
        "tied embeddings",
    ),
    Seam(
        f"{_CORE}.models.gpt.GPTModel.sharded_state_dict",
        ("metadata",),
        "where each weight lies in a checkpoint",
        ("host/weights.py", "convert/checkpoint_entries.py"),
        "loading a teacher, every conversion",
    ),
    Seam(
        f"{_CORE}.transformer.utils.make_sharded_tensors_for_checkpoint",
        ("state_dict", "prefix", "sharded_offsets", "tp_group", "dp_cp_group"),
        "where in a checkpoint lies what terms learn: Megatron asks each child of a GPTModel for `sharded_state_dict`",
        ("step/term_modules.py",),
        "saving terms with parameters",
    ),
    Seam(
        f"{_CORE}.utils.make_viewless_tensor",
        ("requires_grad", "keep_graph"),
        "a stage's output with a loss attached can be freed after it is sent",
        ("step/injection.py",),
        "losses on inner pipeline stages",
    ),
    Seam(
        f"{_SCHEDULES}.forward_backward_no_pipelining",
        _SCHEDULE,
        "the student's schedule with one stage",
        ("step/schedule.py",),
        "every run",
    ),
    Seam(
        f"{_SCHEDULES}.forward_backward_pipelining_without_interleaving",
        (*_SCHEDULE, "collect_non_loss_data", "adjust_tensor_shapes_fn", "p2p_communicator", "pg_collection"),
        "1F1B: boundaries as wide as the carry; the teacher's forward-only pass",
        ("step/pipeline.py", "step/teacher/pipelined.py"),
        "pipelines",
    ),
    Seam(
        f"{_SCHEDULES}.forward_backward_pipelining_with_interleaving",
        _SCHEDULE,
        "virtual stages: a longer `seq_length` makes all boundaries as wide as the carry",
        ("step/pipeline.py",),
        "virtual stages",
    ),
    Seam(
        f"{_CORE}.pipeline_parallel.p2p_communication.P2PCommunicator",
        ("pp_group", "config"),
        "the teacher's own sends, with its own width",
        ("step/teacher/pipelined.py",),
        "pipelines",
    ),
    Seam(
        f"{_CORE}.distributed.finalize_model_grads.finalize_model_grads",
        ("model", "num_tokens"),
        "gradients of a live lens are added after Megatron's own reduction",
        ("step/pipeline.py",),
        "`--fdd-lens-head live` under a pipeline",
    ),
    Seam(
        f"{_CORE}.transformer.TransformerConfig",
        ("finalize_model_grads_func", "grad_scale_func", "pipeline_dtype", "perform_initialization"),
        "the place for that function; the scale of an injected loss; what is sent",
        ("step/pipeline.py", "step/student.py", "convert/mcore_model.py"),
        "pipelines, conversions",
    ),
    Seam(
        f"{_TRAINING}.pretrain",
        ("cfg_container", "train_valid_test_dataset_provider", "model_type", "forward_step_func"),
        "the training loop, with our forward step and our data",
        ("distill.py",),
        "every run",
    ),
    Seam(
        f"{_TRAINING}.training.training_log",
        ("loss_dict", "iteration", "grad_norm", "learning_rate", "is_first_iteration"),
        "what is written to the metrics file and on the terminal",
        ("step/schedule.py",),
        "`--fdd-metrics-file`, the line of a step, the check of the gradient's norm",
    ),
    Seam(
        f"{_TRAINING}.training.save_checkpoint",
        ("iteration", "model"),
        "the check of the weights before a save, and the line that says that a checkpoint has been saved",
        ("step/schedule.py",),
        "every run with `--save`",
    ),
    Seam(
        f"{_TRAINING}.training.load_checkpoint",
        ("ddp_model", "optimizer", "opt_param_scheduler"),
        "an optimizer goes on at another learning rate than it was saved with",
        ("host/patches/rates.py",),
        "`--override-opt_param-scheduler` with another `--lr`",
    ),
    Seam(
        f"{_TRAINING}.training.get_optimizer_param_scheduler",
        ("optimizer",),
        "this run's schedules, to be compared with a checkpoint's before anything is loaded",
        ("plan/resumption.py",),
        "every run",
    ),
    Seam(
        f"{_TRAINING}.training.evaluate_and_print_results",
        ("prefix", "iteration"),
        "the same for a validation",
        ("step/schedule.py",),
        "validation in the metrics file",
    ),
    Seam(
        f"{_TRAINING}.datasets.data_samplers.MegatronFullValidationSampler",
        ("total_samples", "data_parallel_rank", "data_parallel_size"),
        "ours takes its place; its length is the number of steps of a validation",
        ("data/full_validation.py",),
        "`--full-validation`",
    ),
    Seam(
        f"{_TRAINING}.models.gpt.GPTModelConfig",
        ("pre_wrap_hooks", "post_wrap_hooks", "transformer", "rope_scaling_factor", "transformer_layer_spec"),
        "the student is built: what terms learn becomes a part of it; it is wrapped, and not loaded yet: the teacher "
        "joins it",
        ("distill.py", "host/model.py"),
        "every run",
    ),
    Seam(
        f"{_TRAINING}.models.gpt.GPTModelBuilder.build_model",
        ("pg_collection", "pre_process", "post_process", "vp_stage"),
        "builds the teacher's stage, and the model of a conversion",
        ("step/teacher/loading.py", "convert/mcore_model.py"),
        "every run, every conversion",
    ),
    Seam(
        f"{_TRAINING}.models.gpt.default_layer_spec",
        ("config", "vp_stage"),
        "Megatron's own layer, of which a family with layers of its own changes parts",
        ("host/layer_parts.py",),
        _OWN_LAYERS,
    ),
    Seam(
        f"{_CORE}.transformer.transformer_config.TransformerConfig",
        ("activation_func", "bias_activation_fusion", "softmax_scale", "use_mup", "mup_embedding_mult"),
        "set behind Megatron's own checks, where no argument says it",
        ("convert/families/gemma.py",),
        "Gemma 2 and 3",
    ),
    Seam(
        f"{_CORE}.transformer.attention.SelfAttention.forward",
        ("rotary_pos_emb", "packed_seq_params"),
        "other angles on layers with a window",
        ("host/layer_parts.py",),
        "Gemma 3",
    ),
    Seam(
        f"{_CORE}.models.common.embeddings.rotary_pos_embedding.RotaryEmbedding.forward",
        ("max_seq_len", "packed_seq", "cp_group"),
        "these angles",
        ("host/layer_parts.py",),
        "Gemma 3",
    ),
    Seam(
        f"{_CORE}.tensor_parallel.layers.RowParallelLinear",
        ("input_size", "output_size", "config", "bias"),
        "a matrix with a norm behind it",
        ("host/layer_parts.py",),
        _OWN_LAYERS,
    ),
    Seam(
        f"{_TRAINING}.arguments.parse_args",
        ("extra_args_provider",),
        "our argument group beside Megatron's",
        ("plan/command_line.py",),
        "every run",
    ),
    Seam(
        f"{_TRAINING}.arguments.validate_args",
        ("args", "defaults"),
        "Megatron's own checks, before any process group exists",
        ("plan/run.py", "convert/mcore_model.py"),
        "every run, every conversion",
    ),
    Seam(
        f"{_TRAINING}.checkpointing.load_args_from_checkpoint",
        ("args", "load_arg"),
        "`--use-checkpoint-args`, which we complete",
        ("plan/student_arguments.py",),
        "`--use-checkpoint-args`",
    ),
    Seam(
        f"{_TRAINING}.argument_utils.pretrain_cfg_container_from_args",
        ("args", "model_cfg"),
        "from arguments to what `pretrain` takes",
        ("distill.py",),
        "every run",
    ),
    Seam(
        f"{_CHECKPOINT}.load",
        ("sharded_state_dict", "checkpoint_dir", "strict"),
        "the teacher's weights, with lists of what did not fit",
        ("host/weights.py",),
        "loading a teacher",
    ),
    Seam(
        f"{_CHECKPOINT}.save",
        ("sharded_state_dict", "checkpoint_dir", "sharded_strategy", "content_metadata"),
        "a conversion writes an ordinary checkpoint",
        ("convert/mcore_checkpoint.py",),
        "Hugging Face to Megatron",
    ),
    Seam(
        f"{_CHECKPOINT}.strategies.torch.TorchDistSaveShardedStrategy.save",
        ("sharded_state_dict", "checkpoint_dir"),
        "the same with one tensor in memory",
        ("convert/streaming_save.py",),
        "Hugging Face to Megatron",
    ),
    Seam(
        f"{_CHECKPOINT}.strategies.cached_metadata_filesystem_reader.CachedMetadataFileSystemReader",
        ("path",),
        "reads the chunks of one parameter at a time",
        ("convert/mcore_checkpoint.py", "convert/stored_chunks.py"),
        "Megatron to Hugging Face",
    ),
    Seam(
        f"{_CORE}.datasets.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder",
        ("cls", "sizes", "is_built_on_rank", "config"),
        "our data sets, blended as Megatron's",
        ("data/provider.py",),
        "every run",
    ),
    Seam(
        f"{_TRAINING}.theoretical_memory_usage.compute_weight_and_optimizer_memory",
        ("args",),
        "the student's part of the memory estimate",
        ("plan/sizes.py",),
        "`fdd plan`",
    ),
)
