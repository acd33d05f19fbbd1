"""Stock Megatron models with given full weights, cut for this rank, and the assembly of their full gradients."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor

from megatron_fdd.host.topology import Topology
from megatron_fdd.step.teacher.arguments import even_layout
from megatron_fdd.step.teacher.loading import build_stage
from tests.oracle.reference import Shape, Weights

# The vocabulary is padded to a multiple of this times the tensor-parallel size.
DIVISIBLE_BY = 4


def model_config(
    shape: Shape,
    topology: Topology,
    dtype: torch.dtype,
    *,
    virtual: int | None = None,
    transformer_impl: str = "local",
    **options: object,
) -> GPTModelConfig:
    """Return the Megatron configuration of `shape` on this layout; `options` go to TransformerConfig."""
    layout = None
    if topology.num_stages > 1:
        layout = even_layout(shape.num_layers, topology.num_stages * (virtual or 1))
    transformer = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_width,
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.epsilon,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=topology.num_stages,
        context_parallel_size=topology.context_size,
        pipeline_dtype=dtype,
        sequence_parallel=topology.sequence_parallel,
        use_cpu_initialization=not options.get("fp8_param"),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        transformer_impl=transformer_impl,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        calculate_per_token_loss=True,
        expert_model_parallel_size=1 if shape.experts is None else topology.collection.ep.size(),
        num_moe_experts=shape.experts,
        moe_router_topk=shape.topk,
        moe_aux_loss_coeff=shape.aux_loss,
        moe_token_dispatcher_type="alltoall",
        pipeline_model_parallel_layout=layout,
        virtual_pipeline_model_parallel_size=virtual,
        # gloo supports only this form of interleaved sends.
        overlap_p2p_comm=virtual is not None,
        batch_p2p_comm=virtual is None,
        deallocate_pipeline_outputs=True,  # as megatron.training always sets it
        finalize_model_grads_func=finalize_model_grads,
        **options,
    )
    transformer.logit_cap = shape.cap
    return GPTModelConfig(
        transformer=transformer,
        vocab_size=padded_vocab(shape, topology),
        seq_length=64,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
    )


def padded_vocab(shape: Shape, topology: Topology) -> int:
    multiple = DIVISIBLE_BY * topology.tensor_size
    return -(-shape.vocab // multiple) * multiple


def build_student(
    shape: Shape,
    weights: Weights,
    topology: Topology,
    dtype: torch.dtype,
    *,
    ddp: dict | None = None,
    before_wrap: Callable[[list[GPTModel]], list[GPTModel]] | None = None,
    **options: object,
) -> torch.nn.Module:
    """Build a GPTModel in Megatron's DistributedDataParallel; parameters of terms keep their first values."""
    model_parallel_cuda_manual_seed(1)
    config = model_config(shape, topology, dtype, **options)
    config.pre_wrap_hooks += [] if before_wrap is None else [before_wrap]
    builder = GPTModelBuilder(config)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **(ddp or {}))
    chunks = builder.build_distributed_models(ProcessGroupCollection.use_mpu_process_groups(), ddp_config)
    for chunk in chunks:
        load_weights(unwrap_model(chunk), weights, topology)
    return chunks


def build_frozen(
    shape: Shape,
    weights: Weights,
    topology: Topology,
    dtype: torch.dtype,
    *,
    padded_like: Shape,
    **options: object,
) -> GPTModel:
    """Build a GPTModel in evaluation mode without gradients; its vocabulary is padded like that of `padded_like`."""
    model_parallel_cuda_manual_seed(1)
    config = model_config(shape, topology, dtype, **{"fp8_param": "fp8" in options, **options})
    config.vocab_size = padded_vocab(padded_like, topology)
    with torch.no_grad():
        model = build_stage(config, topology).to(device=torch.cuda.current_device(), dtype=dtype)
    load_weights(model, weights, topology)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def load_weights(model: GPTModel, weights: Weights, topology: Topology) -> None:
    """Copy this rank's part of every full tensor. Padded vocabulary rows become garbage, not zero."""
    for name, parameter in model.named_parameters():
        if name.startswith("fdd_terms."):
            continue
        full = weights[full_name(model, name, weights, topology)]
        if is_vocabulary(name):
            rows = parameter.shape[0] * topology.tensor_size
            full = torch.cat([full, torch.full((rows - len(full), full.shape[1]), 7.0)])
        parameter.copy_(cut(name, full, parameter, topology))


def full_name(
    model: GPTModel, name: str, weights: Weights, topology: Topology, expert_rank: int | None = None
) -> str:
    """Return a parameter's name in the whole model; `name` counts layers of the stage and experts of the rank."""
    if name == "output_layer.weight" and name not in weights:
        return "embedding.word_embeddings.weight"  # the last stage's copy of a tied embedding
    if not name.startswith("decoder.layers."):
        return name
    _, _, layer, rest = name.split(".", 3)
    rest = re.sub(r"^self_attention.linear_qkv.layer_norm_", "input_layernorm.", rest)  # TransformerEngine's
    rest = re.sub(r"^mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.", rest)
    rest = re.sub(  # experts that are multiplied together
        r"^(mlp\.experts)\.(linear_fc[12])\.weight(\d+)$", r"\1.local_experts.\3.\2.weight", rest
    )
    if is_expert(name):
        before, local, tail = re.split(r"(?<=local_experts)\.(\d+)\.", rest)
        rank = topology.collection.ep.rank() if expert_rank is None else expert_rank
        first = rank * model.config.num_moe_experts // topology.collection.ep.size()
        rest = f"{before}.{first + int(local)}.{tail}"
    return f"decoder.layers.{int(layer) + get_transformer_layer_offset(model.config, model.vp_stage)}.{rest}"


def full_gradients(
    chunks: list[torch.nn.Module], topology: Topology, vocab: int, weights: Weights
) -> Weights:
    """Return every parameter's `main_grad` as one full tensor, the same on all ranks, in host memory."""
    gradients: Weights = {}
    for student in unwrap_model(chunks):
        for name, parameter in student.named_parameters():
            parts = [torch.empty_like(parameter.main_grad) for _ in range(topology.tensor_size)]
            dist.all_gather(parts, parameter.main_grad.contiguous(), group=topology.tensor_group)
            full = join(name, parts, parameter)
            if is_vocabulary(name):
                assert not full[vocab:].any(), f"{name}: padded rows received gradient"
                full = full[:vocab]
            if not is_expert(name):
                gradients[full_name(student, name, weights, topology)] = full.double().cpu()
                continue
            shared = topology.collection.ep
            parts = [torch.empty_like(full) for _ in range(shared.size())]
            dist.all_gather(parts, full, group=shared)
            for rank, part in enumerate(parts):
                gradients[full_name(student, name, weights, topology, rank)] = part.double().cpu()
    stages: list[Weights] = [{} for _ in range(topology.num_stages)]
    dist.all_gather_object(stages, gradients, group=topology.pipeline_group)
    for other in stages:
        for name in gradients.keys() & other.keys():
            # Both ends of the pipeline hold a tied embedding; Megatron has made their gradients equal.
            assert torch.equal(gradients[name], other[name]), f"{name} differs between stages"
        gradients |= other
    return gradients


def cut(name: str, full: Tensor, parameter: torch.nn.Parameter, topology: Topology) -> Tensor:
    if not is_split(parameter):
        return full
    pieces = full.chunk(2) if is_gate_and_up(name) else (full,)  # cut apart
    size, rank = topology.tensor_size, topology.tensor_rank
    return torch.cat(
        [piece.chunk(size, parameter.partition_dim)[rank] for piece in pieces], parameter.partition_dim
    )


def join(name: str, parts: list[Tensor], parameter: torch.nn.Parameter) -> Tensor:
    if not is_split(parameter):
        for part in parts:
            # Replicated parameters must agree, or the ranks drift apart.
            torch.testing.assert_close(
                part, parts[0], rtol=0, atol=1e-6 * float(parts[0].abs().max() + 1e-30)
            )
        return parts[0]
    if is_gate_and_up(name):
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts, parameter.partition_dim)


def is_split(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def is_expert(name: str) -> bool:
    return ".mlp.experts." in name


def is_gate_and_up(name: str) -> bool:
    return re.search(r"linear_fc1\.weight\d*$", name) is not None


def is_vocabulary(name: str) -> bool:
    return name.startswith(("embedding.", "output_layer."))
