"""The names that a model type gives to its experts, in config.json and in its files."""

from __future__ import annotations

from dataclasses import dataclass

PER_TOKEN = "num_experts_per_tok"
GROUPS, TOP_GROUPS, SCALING = "n_group", "topk_group", "routed_scaling_factor"
QWENS_LAYERS = ("decoder_sparse_step", "mlp_only_layers")
FIRST_DENSE = ("first_k_dense_replace",)
QWENS_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class SharedNaming:
    """An expert that processes every token, beside those that a router chooses.

    Attributes:
        block: its module, beside the router.
        count_field: config.json field with the number of experts that it replaces, each as wide as the others; None if
            `width_field` has its width.
        gate: the name of the vector by which a sigmoid scales its output; None if nothing does.
    """

    block: str
    count_field: str | None = None
    width_field: str | None = None
    gate: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The config.json fields that describe it."""
        return tuple(field for field in (self.count_field, self.width_field) if field is not None)


@dataclass(frozen=True, slots=True)
class StackedNaming:
    """Two tensors that hold all experts of a layer, in dim 0. Their biases, if experts have any, add `_bias`.

    Attributes:
        gate_up, down: their names in the block.
        is_transposed: whether an expert's matrices are [in, out].
        alternates: whether gate and up take turns along the width; else all of gate comes first.
    """

    gate_up: str
    down: str
    is_transposed: bool = False
    alternates: bool = False


@dataclass(frozen=True, slots=True)
class ExpertNaming:
    """The names under which a model type keeps its experts.

    Attributes:
        block: the module that replaces the MLP.
        projections: names of gate, up and down in an expert.
        count_fields: config.json fields that may hold the number of experts, the usual one first.
        width_field: config.json field with the width of one expert.
        layer_fields: config.json fields that say which layers have experts; none if all have. The width of the others
            is then `intermediate_size`.
        normalises: whether `norm_topk_prob` says if the weights of a token's experts sum to 1; they do without it.
        router: the name of the router's matrix in the block.
        router_bias: the name of the bias of the router's logits; None if they have none.
        bias: the name of the bias by which a sigmoid router chooses experts, always float32; None for a softmax.
        own_router: whether the layer specification brings the router: a softmax, to which `bias` is added, which is one
            row on disk. All of it is float32.
        is_sigmoid: whether scores are sigmoids although there is no `bias`.
        grouped: whether `n_group`, `topk_group` and `routed_scaling_factor` describe the router.
        float32_router: whether transformers computes the router's logits in float32. --moe-router-dtype overrules it.
        shared: an expert for every token; None if there is none.
        stacked: the tensors with all experts of a layer; None if each expert has its own three.
    """

    block: str
    projections: tuple[str, str, str]
    count_fields: tuple[str, ...]
    width_field: str
    layer_fields: tuple[str, ...] = ()
    normalises: bool = False
    router: str = "gate.weight"
    router_bias: str | None = None
    bias: str | None = None
    grouped: bool = False
    float32_router: bool = False
    own_router: bool = False
    is_sigmoid: bool = False
    shared: SharedNaming | None = None
    stacked: StackedNaming | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The config.json fields that describe experts."""
        return (
            *self.count_fields,
            self.width_field,
            PER_TOKEN,
            *self.layer_fields,
            *(("norm_topk_prob",) if self.normalises else ()),
            *((GROUPS, TOP_GROUPS, SCALING) if self.grouped else ()),
            *(self.shared.fields if self.shared else ()),
        )


# A router with sigmoids and a bias, as of DeepSeek-V3 and GLM-4.5.
DEEPSEEKS_EXPERTS = ExpertNaming(
    block="mlp",
    projections=QWENS_PROJECTIONS,
    count_fields=("n_routed_experts", "num_local_experts"),
    width_field="moe_intermediate_size",
    layer_fields=FIRST_DENSE,
    normalises=True,
    bias="gate.e_score_correction_bias",
    grouped=True,
    float32_router=True,
    shared=SharedNaming("shared_experts", count_field="n_shared_experts"),
)
