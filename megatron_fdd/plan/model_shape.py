"""The shape of a GPT and the parallel sizes that cut it, from Megatron's arguments, with the counts that follow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParallelSizes:
    """The numbers of ranks over which a model is cut.

    Attributes:
        expert: number of ranks that share the experts of a layer.
        expert_tensor: number of ranks that share the matrices of one expert.
    """

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int

    @classmethod
    def of_args(cls, args: argparse.Namespace) -> ParallelSizes:
        """Take the sizes from a model's arguments in this run, validated or not."""
        tensor = args.tensor_model_parallel_size
        return cls(
            tensor,
            args.pipeline_model_parallel_size,
            args.expert_model_parallel_size,
            args.expert_tensor_parallel_size or tensor,  # Megatron's default
        )


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The mixtures of experts of one model.

    Attributes:
        count: number of experts in a layer.
        width: width of one expert's feed-forward layer.
        top_k: number of experts that a token is routed to.
        shared_width: width of the experts that every token passes too; 0 without them.
        layers: the layers with experts, 0-based.
    """

    count: int
    width: int
    top_k: int
    shared_width: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LatentWidths:
    """The widths of multi-latent attention.

    Attributes:
        queries: of the queries' latent; None if one matrix makes queries from the hidden state.
        keys_values: of the latent of keys and values.
        plain, rotated: of the parts of a head's query and key.
        value: of a head's value.
    """

    queries: int | None
    keys_values: int
    plain: int
    rotated: int
    value: int

    @classmethod
    def of_args(cls, args: argparse.Namespace) -> LatentWidths | None:
        """Take the widths from a model's arguments in this run; None if its attention is not multi-latent."""
        if not getattr(args, "multi_latent_attention", False):
            return None
        return cls(
            args.q_lora_rank, args.kv_lora_rank, args.qk_head_dim, args.qk_pos_emb_head_dim, args.v_head_dim
        )

    @property
    def down_width(self) -> int:
        """Width of what the matrices make from the hidden state that stand before latents."""
        return (self.queries or 0) + self.keys_values + self.rotated

    def up_parameters(self, hidden: int, heads: int) -> int:
        """Count the parameters of the other matrices, the output's too."""
        queries = (self.queries or hidden) * (self.plain + self.rotated)
        return heads * (queries + self.keys_values * (self.plain + self.value) + self.value * hidden)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The shape of one model, which is enough to count its matrices and their products.

    Attributes:
        hidden: width of the hidden states.
        ffn: width of a feed-forward layer without experts; 0 if Megatron has not filled it in yet.
        heads: number of query heads.
        groups: number of key-value heads.
        vocab: rows of the head that count, over all tensor ranks; 0 if the head does not matter.
        gated: whether a feed-forward layer has three matrices.
        num_layers: may be left out if only one layer matters.
        has_output_gate: whether the attention's first matrix makes a gate beside each query.
        experts: None for a dense model.
        latent: None if attention is not multi-latent.
        is_capped: whether the logits have a soft cap, which arguments alone do not say.
    """

    hidden: int
    ffn: int
    heads: int
    groups: int
    head_width: int
    vocab: int
    gated: bool
    seq_length: int
    num_layers: int = 1
    has_output_gate: bool = False
    experts: ExpertShape | None = None
    latent: LatentWidths | None = None
    is_capped: bool = False

    @classmethod
    def of_args(cls, args: argparse.Namespace, *, vocab: int = 0) -> ModelShape:
        """Take the shape from a model's arguments in this run, validated or not."""
        heads = args.num_attention_heads
        return cls(
            hidden=args.hidden_size,
            ffn=args.ffn_hidden_size or 0,
            heads=heads,
            groups=args.num_query_groups if args.group_query_attention else heads,
            head_width=args.kv_channels or args.hidden_size // heads,
            vocab=vocab,
            gated=args.swiglu,
            seq_length=args.seq_length,
            num_layers=args.num_layers,
            has_output_gate=args.attention_output_gate,
            experts=_experts(args),
            latent=LatentWidths.of_args(args),
        )

    @property
    def attention_width(self) -> int:
        """Width of the attention's output, all heads together."""
        return self.heads * (self.head_width if self.latent is None else self.latent.value)

    @property
    def query_width(self) -> int:
        """Width of the queries that attention scores, all heads together."""
        return self.heads * (
            self.head_width if self.latent is None else self.latent.plain + self.latent.rotated
        )

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values together, gates included."""
        return self.head_width * (self.heads * (2 if self.has_output_gate else 1) + 2 * self.groups)

    @property
    def attention_parameters(self) -> int:
        """Parameters of the matrices of one attention."""
        if self.latent is not None:
            return self.hidden * self.latent.down_width + self.latent.up_parameters(self.hidden, self.heads)
        return self.hidden * (self.qkv_width + self.attention_width)

    @property
    def parameters_per_width(self) -> int:
        """Parameters of a feed-forward layer for each unit of its width."""
        return self.hidden * (3 if self.gated else 2)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers with experts, 0-based; empty for a dense model."""
        return () if self.experts is None else self.experts.layers

    @property
    def active_ffn(self) -> int:
        """Width of the feed-forward matrices that one token passes, as a mean over the layers; without routers."""
        if self.experts is None:
            return self.ffn
        experts = self.experts
        routed = len(experts.layers) * (experts.top_k * experts.width + experts.shared_width)
        return (routed + (self.num_layers - len(experts.layers)) * self.ffn) // self.num_layers

    def matrix_parameters(self, layers: Sequence[int], sizes: ParallelSizes) -> int:
        """Count the parameters of the matrices of these layers on a rank, without routers.

        The matrices before latents count as whole on every rank, as TransformerEngine's are.
        """
        with_experts = len(set(self.expert_layers).intersection(layers))
        widths, routed = (len(layers) - with_experts) * self.ffn, 0
        if self.experts is not None:
            widths += with_experts * self.experts.shared_width
            routed = with_experts * self.experts.count * self.experts.width * self.parameters_per_width
        whole = 0 if self.latent is None else len(layers) * self.hidden * self.latent.down_width
        cut = len(layers) * self.attention_parameters - whole + widths * self.parameters_per_width
        return whole + cut // sizes.tensor + routed // (sizes.expert_tensor * sizes.expert)

    @property
    def router_parameters(self) -> int:
        """Parameters of all routers, which every rank holds whole."""
        return 0 if self.experts is None else len(self.experts.layers) * self.experts.count * self.hidden


def _experts(args: argparse.Namespace) -> ExpertShape | None:
    if not args.num_experts:
        return None
    pattern = args.moe_layer_freq
    if isinstance(pattern, int):  # one layer in so many has experts
        pattern = [layer % pattern == 0 for layer in range(args.num_layers)]
    return ExpertShape(
        count=args.num_experts,
        width=args.moe_ffn_hidden_size or args.ffn_hidden_size or 0,
        top_k=args.moe_router_topk,
        shared_width=args.moe_shared_expert_intermediate_size or 0,
        layers=tuple(layer for layer, has_experts in enumerate(pattern) if has_experts),
    )
