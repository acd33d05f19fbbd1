"""The reference that every layout must reproduce: models and losses of docs/method.md in plain float64, one process.

Nothing here is shared with the package: no tiles, no Gram matrices, no Megatron. Weights are dicts of full
tensors under the names of a stock GPTModel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.reference_experts import balancing_loss, feed_forward, mlp_prefixes, routing

Weights = dict[str, Tensor]
# Sequences in a micro-batch: only a router's balancing loss depends on where a micro-batch ends.
MICRO_BATCH = 2


@dataclass(frozen=True)
class Shape:
    """A small Llama-like model."""

    num_layers: int
    hidden: int
    heads: int
    groups: int
    head_width: int
    ffn: int
    vocab: int = 50
    tied: bool = False
    epsilon: float = 1e-5
    experts: int | None = None
    topk: int = 2
    aux_loss: float = 0.0
    cap: float | None = None  # of the logits
    head_bias: bool = False  # as only a stored teacher has it


STUDENT = Shape(num_layers=6, hidden=48, heads=24, groups=12, head_width=4, ffn=96)
TEACHER = Shape(num_layers=10, hidden=72, heads=12, groups=12, head_width=8, ffn=120)


def random_weights(shape: Shape, seed: int) -> Weights:
    """Make full tensors of float32 values, large enough that no gradient is negligible."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * scale / columns**0.5

    def norm() -> Tensor:
        return 1 + 0.2 * torch.randn(shape.hidden, generator=generator)

    query, key = shape.heads * shape.head_width, shape.groups * shape.head_width
    weights = {"embedding.word_embeddings.weight": matrix(shape.vocab, shape.hidden, shape.hidden**0.5)}
    for layer in range(shape.num_layers):
        prefix = f"decoder.layers.{layer}."
        weights[prefix + "input_layernorm.weight"] = norm()
        weights[prefix + "self_attention.linear_qkv.weight"] = matrix(query + 2 * key, shape.hidden)
        weights[prefix + "self_attention.linear_proj.weight"] = matrix(shape.hidden, query)
        weights[prefix + "pre_mlp_layernorm.weight"] = norm()
        if shape.experts is not None:  # the router is so sharp that no two experts tie
            weights[prefix + "mlp.router.weight"] = matrix(shape.experts, shape.hidden, 3.0)
        for mlp in mlp_prefixes(shape.experts, prefix):
            weights[mlp + "linear_fc1.weight"] = matrix(2 * shape.ffn, shape.hidden)
            weights[mlp + "linear_fc2.weight"] = matrix(shape.hidden, shape.ffn)
    weights["decoder.final_layernorm.weight"] = norm()
    if not shape.tied:
        weights["output_layer.weight"] = matrix(shape.vocab, shape.hidden, 3.0)
    return weights


def double(weights: Weights, *, requires_grad: bool) -> Weights:
    """Return a float64 copy that can be differentiated."""
    return {name: value.double().requires_grad_(requires_grad) for name, value in weights.items()}


def forward(
    shape: Shape, weights: Weights, batch: dict[str, Tensor], probabilities: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Return the final normed hidden states [B, S, H], and the output of every layer.

    Appends to `probabilities` each router's softmax over all experts [B, S, E].
    """
    x = weights["embedding.word_embeddings.weight"][batch["tokens"]]
    places, forbidden = batch["position_ids"], forbidden_pairs(batch)
    blocks = []
    for layer in range(shape.num_layers):
        prefix = f"decoder.layers.{layer}."
        h = rms_norm(x, weights[prefix + "input_layernorm.weight"], shape.epsilon)
        qkv = F.linear(h, weights[prefix + "self_attention.linear_qkv.weight"])
        x = x + F.linear(
            attention(shape, qkv, places, forbidden), weights[prefix + "self_attention.linear_proj.weight"]
        )
        h = rms_norm(x, weights[prefix + "pre_mlp_layernorm.weight"], shape.epsilon)
        mlps = [feed_forward(weights, mlp, h) for mlp in mlp_prefixes(shape.experts, prefix)]
        if shape.experts is None:
            x = x + mlps[0]
        else:
            logits = F.linear(h, weights[prefix + "mlp.router.weight"])
            x = x + (routing(logits, shape.topk)[..., None] * torch.stack(mlps, -2)).sum(-2)
            if probabilities is not None:
                probabilities.append(logits.softmax(-1))
        blocks.append(x)
    return rms_norm(x, weights["decoder.final_layernorm.weight"], shape.epsilon), blocks


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def forbidden_pairs(batch: dict[str, Tensor]) -> Tensor:
    """Return bool [B, 1, query, key]: later tokens, and tokens of other documents in a packed sequence."""
    length = batch["tokens"].shape[1]
    later = torch.ones(length, length).triu(1).bool()
    if "cu_seqlens" not in batch:
        return later[None, None]
    places = torch.arange(length)
    documents = torch.stack([torch.bucketize(places, row[1:], right=True) for row in batch["cu_seqlens"]])
    return (later | (documents[:, :, None] != documents[:, None, :]))[:, None]


def attention(shape: Shape, qkv: Tensor, places: Tensor, forbidden: Tensor) -> Tensor:
    """Compute causal attention; Megatron keeps the queries of a group beside its key and value."""
    batch, length, _ = qkv.shape
    per_group = shape.heads // shape.groups
    grouped = qkv.view(batch, length, shape.groups, per_group + 2, shape.head_width)
    query = rotate(grouped[..., :per_group, :].flatten(2, 3), places)
    key = rotate(grouped[..., per_group, :], places).repeat_interleave(per_group, 2)
    value = grouped[..., per_group + 1, :].repeat_interleave(per_group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / shape.head_width**0.5
    scores = scores.masked_fill(forbidden, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)


def rotate(x: Tensor, places: Tensor, base: float = 10000.0) -> Tensor:
    """Apply rotary position embedding to [B, S, heads, width] at places [B, S], rotating halves."""
    width = x.shape[-1]
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = places[..., None].double() * frequency
    angle = torch.cat([angle, angle], -1)[:, :, None].to(x.dtype)
    left, right = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


@dataclass(frozen=True)
class Terms:
    """The composition of the loss, with the defaults of FddConfig."""

    pairs: tuple[tuple[int, int], ...] = ((1, 2), (3, 6), (4, 8))
    alpha: float = 1.0
    beta: float = 1.0
    kd: float = 1.0
    ce: float = 0.0
    kd_kind: str = "fkl"
    trajectory_kind: str = "fkl"
    mix: float | None = None
    temperature: float = 1.0
    lens_norm: bool = True
    live: bool = False
    centred: bool = False
    detach_previous: bool = False
    all_tokens: bool = False
    tuned: bool = False  # the teacher's lens has a map of its own for each block: `random_maps`


def distillation_loss(
    terms: Terms, shapes: tuple[Shape, Shape], weights: tuple[Weights, Weights], batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """Return the total (a mean over tokens) and the token mean of every term, for (student, teacher).

    Source: docs/method.md.
    """
    (student_shape, teacher_shape), (student, teacher) = shapes, weights
    routers: list[Tensor] = []
    student_final, student_blocks = forward(student_shape, student, batch, routers)
    with torch.no_grad():
        teacher_final, teacher_blocks = forward(teacher_shape, teacher, batch)
    label = batch["loss_mask"].double()
    term = batch["token_mask"].double() if terms.all_tokens else label
    vocab = min(student_shape.vocab, teacher_shape.vocab)
    z_student = finished(student_shape, F.linear(student_final, head(student)[:vocab]))
    z_teacher = finished(teacher_shape, F.linear(teacher_final, head(teacher)[:vocab]))

    def mean(value: Tensor, mask: Tensor) -> Tensor:
        return value[mask > 0].sum() / mask.sum().clamp(min=1)

    def of_logits(kind: str, z_teacher: Tensor, z_student: Tensor) -> Tensor:
        return mean(divergence(kind, terms.mix, terms.temperature, z_teacher, z_student), term)

    ce = -z_student.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
    parts = {"ce": mean(ce, label), "kd": of_logits(terms.kd_kind, z_teacher, z_student)}
    total = terms.ce * parts["ce"] + terms.kd * parts["kd"]
    y_student, y_teacher = [], []
    for s, t in terms.pairs:
        lens_s = lens(terms, student_shape, student, student_blocks[s - 1], detached=not terms.live)
        lens_s = finished(student_shape, lens_s[..., :vocab])
        block_t = teacher_blocks[t - 1]
        if terms.tuned:
            weight, bias = (each.double() for each in random_maps(teacher_shape)[t])
            block_t = block_t + F.linear(block_t, weight, bias)
        lens_t = lens(terms, teacher_shape, teacher, block_t, detached=True)[..., :vocab]
        lens_t = finished(teacher_shape, lens_t)
        value = of_logits(terms.trajectory_kind, lens_t, lens_s)
        parts[f"trajectory s{s}:t{t}"] = value
        total = total + terms.alpha * value / len(terms.pairs)
        y_student.append(delta_space(terms, lens_s))
        y_teacher.append(delta_space(terms, lens_t))
    for j in range(1, len(terms.pairs)):
        before = y_student[j - 1].detach() if terms.detach_previous else y_student[j - 1]
        cosine = F.cosine_similarity(y_teacher[j] - y_teacher[j - 1], y_student[j] - before, dim=-1)
        s, t = terms.pairs[j]
        parts[f"delta s{s}:t{t}"] = mean(1 - cosine, term)
        total = total + terms.beta * parts[f"delta s{s}:t{t}"] / (len(terms.pairs) - 1)
    means = {name: value.item() for name, value in parts.items()} | {"total": total.item()}
    if student_shape.aux_loss:  # Megatron adds only its gradient; the reported loss does not contain it
        total = (
            total
            + student_shape.aux_loss * balancing_loss(routers, student_shape.topk, MICRO_BATCH) / term.sum()
        )
    return total, means


def random_maps(shape: Shape) -> dict[int, tuple[Tensor, Tensor]]:
    """Weight and bias of the tuned lens for each block, float32; no two are alike, and none is near zero."""
    generator = torch.Generator().manual_seed(5)
    return {
        block: (
            torch.randn(shape.hidden, shape.hidden, generator=generator) / shape.hidden**0.5,
            torch.randn(shape.hidden, generator=generator),
        )
        for block in range(1, shape.num_layers + 1)
    }


def head(weights: Weights) -> Tensor:
    return weights.get("output_layer.weight", weights["embedding.word_embeddings.weight"])


def lens(terms: Terms, shape: Shape, weights: Weights, x: Tensor, *, detached: bool) -> Tensor:
    norm, matrix = weights["decoder.final_layernorm.weight"], head(weights)
    if detached:
        norm, matrix = norm.detach(), matrix.detach()
    return F.linear(rms_norm(x, norm, shape.epsilon) if terms.lens_norm else x, matrix)


def bias_of_head(shape: Shape) -> Tensor:
    """Bias of a head, float32."""
    return torch.linspace(-2, 3, shape.vocab)


def finished(shape: Shape, z: Tensor) -> Tensor:
    """Add what the logits of some models have beside the product with their head; z [..., some of the vocabulary]."""
    if shape.head_bias:
        z = z + bias_of_head(shape)[: z.shape[-1]].double()
    return z if shape.cap is None else shape.cap * torch.tanh(z / shape.cap)


def delta_space(terms: Terms, z: Tensor) -> Tensor:
    return z - z.mean(-1, keepdim=True) if terms.centred else z.log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


# Functions of both log-probabilities over the whole vocabulary and the mix.
DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "fkl": lambda log_t, log_s, _: (log_t.exp() * (log_t - log_s)).sum(-1),
    "rkl": lambda log_t, log_s, _: (log_s.exp() * (log_s - log_t)).sum(-1),
    "jsd": lambda log_t, log_s, mix: jensen_shannon(log_t.exp(), log_s.exp(), mix),
    "sfkl": lambda log_t, log_s, mix: kl(log_t.exp(), mix * log_t.exp() + (1 - mix) * log_s.exp()),
    "srkl": lambda log_t, log_s, mix: kl(log_s.exp(), mix * log_s.exp() + (1 - mix) * log_t.exp()),
}
DEFAULT_MIX = {"jsd": 0.5, "sfkl": 0.1, "srkl": 0.1}


def jensen_shannon(t: Tensor, s: Tensor, mix: float) -> Tensor:
    m = mix * t + (1 - mix) * s
    return mix * kl(t, m) + (1 - mix) * kl(s, m)


def divergence(
    kind: str, mix: float | None, temperature: float, z_teacher: Tensor, z_student: Tensor
) -> Tensor:
    """Return the divergence of logits [..., V] for each token."""
    log_t, log_s = ((z / temperature).log_softmax(-1) for z in (z_teacher, z_student))
    mix = DEFAULT_MIX.get(kind, float("nan")) if mix is None else mix
    return temperature**2 * DIVERGENCES[kind](log_t, log_s, mix)


def random_batches(num: int, batch: int, length: int, vocab: int, seed: int = 11) -> list[dict[str, Tensor]]:
    """Make micro-batches with random masks; padding (token_mask 0) never has a label."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num):
        tokens = torch.randint(0, vocab, (batch, length + 1), generator=generator)
        token_mask = (torch.rand(batch, length, generator=generator) > 0.2).float()
        loss_mask = token_mask * (torch.rand(batch, length, generator=generator) > 0.4)
        positions = torch.arange(length).expand(batch, -1)
        batches.append(
            {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous(),
             "loss_mask": loss_mask, "token_mask": token_mask, "position_ids": positions}
        )  # fmt: skip
    return batches


def packed(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the same tokens as documents of random lengths, in the form of Megatron's GPTDataset."""
    generator = torch.Generator().manual_seed(12)
    return [batch | _boundaries(*batch["tokens"].shape, generator) for batch in batches]


def _boundaries(rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    boundaries = torch.full((rows, length + 1), length, dtype=torch.int32)
    places = torch.empty(rows, length, dtype=torch.int64)
    longest = torch.empty(rows, dtype=torch.int32)
    for row in range(rows):
        starts = [0, *(1 + torch.randperm(length - 1, generator=generator)[: row + 1]).sort().values.tolist()]
        boundaries[row, : len(starts)] = torch.tensor(starts)
        lengths = [end - start for start, end in zip(starts, [*starts[1:], length], strict=True)]
        places[row] = torch.cat([torch.arange(count) for count in lengths])
        longest[row] = max(lengths)
    return {"cu_seqlens": boundaries, "max_seqlen": longest, "position_ids": places}


def stacked(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join all micro-batches into one: token means do not depend on where a micro-batch ends."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
