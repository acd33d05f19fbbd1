"""linear_kl on one rank: every output and gradient, compared with a float64 reference; precision and memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from megatron_fdd.ops.divergence import DIVERGENCES
from megatron_fdd.ops.linear_kl import Divergence, Heads, Implementation, VocabShard, linear_kl
from tests.ops.linear_kl_case import (
    KINDS,
    Case,
    LargestTensor,
    Products,
    error,
    gradients,
    loss,
    make_case,
    reference_divergence,
    reference_gradients,
    tiles,
)


def run(case: Case, divergence: Divergence | None, *, live: bool, **options):
    """Return outputs and student inputs on one rank; by default everything is asked for, in several tiles."""
    hidden = case.student.clone().requires_grad_()
    head = case.student_head.clone().requires_grad_(live)
    options = {"labels_N": case.labels} | options
    teacher_NT, teacher_WT = options.pop("teacher", (case.teacher, case.teacher_head))
    shard = VocabShard(0, case.vocab_size, None)
    heads = Heads(teacher_WT, head, shard, options.pop("implementation", tiles(16)))
    return linear_kl(teacher_NT, hidden, heads, divergence=divergence, **options), hidden, head


def assert_matches(case: Case, divergence: Divergence | None, *, live: bool, keep=(True,) * 4, **options):
    ours, hidden, head = run(case, divergence, live=live, **options)
    expected, expected_gradients = reference_gradients(case, divergence, keep)
    for value, reference in zip(ours, expected, strict=True):
        assert (value is None) == (reference is None)
        assert value is None or error(value, reference) < 1e-6
    leaves = (hidden, head) if live else (hidden,)
    ours_gradients = gradients(loss(ours, case.upstream), *leaves)
    for gradient, reference in zip(ours_gradients, expected_gradients[: len(leaves)], strict=True):
        assert error(gradient, reference) < 1e-5


@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, temperature: float, live: bool) -> None:
    case = make_case(13, 53, padded=61).to(torch.float32)
    assert_matches(case, Divergence(kind, temperature=temperature), live=live)
    in_blocks = tiles(16, block_rows=5)  # 5, 5 and 3 tokens
    assert_matches(case, Divergence(kind, temperature=temperature), live=live, implementation=in_blocks)
    assert_matches(
        case, Divergence(kind, temperature=temperature), live=live, implementation=Implementation("reference")
    )


@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd"])
def test_fewer_outputs(kind: str, temperature: float, live: bool) -> None:
    case, divergence = make_case(5, 53).to(torch.float32), Divergence(kind, temperature=temperature)
    keep = (True, False, False, False)
    assert_matches(case, divergence, live=live, keep=keep, labels_N=None, needs_lse=False)
    keep = (True, False, False, True)
    assert_matches(case, divergence, live=live, keep=keep, needs_lse=False)
    keep = (True, True, True, False)
    assert_matches(case, divergence, live=live, keep=keep, labels_N=None)


@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
def test_without_divergence_and_without_teacher(live: bool) -> None:
    case = make_case(5, 53, padded=56).to(torch.float32)
    assert_matches(case, None, live=live, keep=(False, True, True, True))
    assert_matches(case, None, live=live, keep=(False, True, True, False), labels_N=None)
    alone = {"teacher": (None, None)}
    assert_matches(case, None, live=live, keep=(False, False, True, True), **alone)
    assert_matches(case, None, live=live, keep=(False, False, False, True), needs_lse=False, **alone)


@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 1), (1, 17), (17, 2), (3, 16), (9, 33)])
@pytest.mark.parametrize("tile_size", [1, 16, 1000])
def test_odd_shapes(num_tokens: int, vocab_size: int, tile_size: int) -> None:
    case = make_case(num_tokens, vocab_size, padded=vocab_size + 3)
    for kind in ("fkl", "jsd"):
        assert_matches(case, Divergence(kind), live=False, implementation=tiles(tile_size))
        assert_matches(case, Divergence(kind), live=True, implementation=tiles(tile_size))


@pytest.mark.parametrize("kind", ["jsd", "sfkl", "srkl"])
def test_mix(kind: str) -> None:
    case = make_case(6, 31).to(torch.float32)
    assert_matches(case, Divergence(kind, mix=0.3), live=True)
    assert_matches(case, Divergence(kind, mix=0.8, temperature=0.5), live=False)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, live: bool) -> None:
    case = make_case(3, 7, padded=8)

    def outputs(hidden: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, ...]:
        divergence = Divergence(kind, temperature=1.5)
        heads = case.heads(head, tiles(3))
        result = linear_kl(case.teacher, hidden, heads, divergence=divergence, labels_N=case.labels)
        return result.divergence_N, result.student_lse_N, result.cross_entropy_N

    leaves = case.student.requires_grad_(), case.student_head.requires_grad_(live)
    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("beyond", [31, 35, 1000])  # a padded row, the row behind them, any other
@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
def test_a_label_beyond_the_vocabulary_is_not_a_number(live: bool, beyond: int) -> None:
    """With every implementation, and the tokens beside it do not notice."""
    case, changed = (make_case(6, 31, padded=35) for _ in range(2))
    changed.labels[2] = beyond
    found = []
    for implementation in (tiles(16), tiles(16, block_rows=2), Implementation("reference")):
        right, _, _ = run(case, Divergence("fkl"), live=live, implementation=implementation)
        ours, hidden, head = run(changed, Divergence("fkl"), live=live, implementation=implementation)
        assert ours.cross_entropy_N.isnan().tolist() == [False, False, True, False, False, False]
        is_number = ~ours.cross_entropy_N.isnan()
        assert torch.equal(ours.cross_entropy_N[is_number], right.cross_entropy_N[is_number])
        found.append(gradients(loss(ours, case.upstream), hidden, *([head] if live else [])))
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert error(one, other) < 1e-12


def test_large_logits_stay_finite() -> None:
    case = make_case(4, 40)
    case.student.mul_(300)
    case.teacher.mul_(300)
    for kind in KINDS:
        if DIVERGENCES[kind].num_sweeps == 1:
            assert_matches(case, Divergence(kind), live=False)
            continue
        # The reference's logarithm of a mixture underflows in this case.
        outputs, hidden, head = run(case.to(torch.float32), Divergence(kind), live=True)
        values = [outputs.divergence_N, *gradients(loss(outputs, case.upstream), hidden, head)]
        assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_give_zero(kind: str) -> None:
    case = make_case(50, 300).to(torch.float32)
    teacher = (case.student, case.student_head)
    outputs, hidden, _ = run(case, Divergence(kind), live=False, teacher=teacher, labels_N=None)
    assert outputs.divergence_N.abs().max() <= 1e-6
    (gradient,) = gradients(outputs.divergence_N.sum(), hidden)
    unequal, hidden, _ = run(case, Divergence(kind), live=False, labels_N=None)
    assert gradient.norm() <= 1e-5 * gradients(unequal.divergence_N.sum(), hidden)[0].norm()


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_within_twice_the_rounding_of_plain_torch(kind: str, live: bool) -> None:
    case = make_case(200, 400, padded=410).to(torch.bfloat16)
    divergence = Divergence(kind)
    ours, *ours_leaves = run(case, divergence, live=live)
    leaves = case.student.clone().requires_grad_(), case.student_head.clone().requires_grad_()
    logits = leaves[0] @ leaves[1][: case.vocab_size].T
    teacher_logits = case.teacher @ case.teacher_head[: case.vocab_size].T
    plain = ours._make(
        [
            reference_divergence(teacher_logits.float(), logits.float(), divergence),
            teacher_logits.float().logsumexp(-1),
            logits.float().logsumexp(-1),
            cross_entropy(logits.float(), case.labels, ignore_index=-100, reduction="none"),
        ]
    )
    expected, expected_gradients = reference_gradients(case, divergence)
    for value, naive, reference in zip(ours, plain, expected, strict=True):
        assert error(value, reference) < min(1e-5, 2 * error(naive, reference))
    plain_gradients = gradients(loss(plain, case.upstream), *leaves)
    ours_gradients = gradients(loss(ours, case.upstream), *ours_leaves[: 1 + live])
    triples = list(zip(ours_gradients, plain_gradients, expected_gradients, strict=False))
    assert len(triples) == 1 + live
    for ours_, naive, reference in triples:
        assert ours_.dtype == torch.bfloat16
        assert error(ours_, reference) < min(3e-3, 2 * error(naive, reference))


def test_widths_of_number_may_differ_between_models() -> None:
    case = make_case(5, 30)
    half = case.to(torch.bfloat16)
    teacher = (half.teacher, half.teacher_head)
    outputs, _, _ = run(case.to(torch.float32), Divergence(), live=False, teacher=teacher)
    rounded = Case(*teacher, *(x.float() for x in (case.student, case.student_head)), *make_rest(case))
    assert error(outputs.divergence_N, rounded.reference(Divergence()).divergence_N) < 1e-6


def make_rest(case: Case) -> tuple:
    return case.labels, case.upstream, case.vocab_size


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd"])
def test_no_tokens(kind: str, live: bool) -> None:
    case = make_case(0, 20, padded=24).to(torch.float32)
    outputs, hidden, head = run(case, Divergence(kind, temperature=2.0), live=live)
    assert all(output.shape == (0,) for output in outputs)
    leaves = (hidden, head) if live else (hidden,)
    for gradient, leaf in zip(gradients(loss(outputs, case.upstream), *leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


def test_teacher_and_padding_get_no_gradient() -> None:
    case = make_case(5, 20, padded=24).to(torch.float32)
    teacher = case.teacher.clone().requires_grad_(), case.teacher_head.clone().requires_grad_()
    outputs, hidden, head = run(case, Divergence(), live=True, teacher=teacher)
    assert not outputs.teacher_lse_N.requires_grad
    loss(outputs, case.upstream).backward()
    assert teacher[0].grad is None
    assert teacher[1].grad is None
    assert head.grad[:20].abs().amin() > 0
    assert not head.grad[20:].any()


def test_without_grad_mode_nothing_is_kept() -> None:
    case = make_case(5, 20).to(torch.float32)
    with torch.no_grad():
        outputs, _, _ = run(case, Divergence(), live=True)
    assert not outputs.divergence_N.requires_grad
    expected = case.reference(Divergence())
    assert error(outputs.divergence_N, expected.divergence_N) < 1e-6


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_grows_with_tokens_times_vocabulary(kind: str, live: bool) -> None:
    num_tokens, vocab_size, tile_size = 256, 1000, 64
    case = make_case(num_tokens, vocab_size).to(torch.float32)
    with LargestTensor() as largest:
        outputs, *_ = run(case, Divergence(kind, temperature=2.0), live=live, implementation=tiles(tile_size))
        loss(outputs, case.upstream).backward()
    # The buffer of both models' logits is the largest.
    assert largest.numel == 2 * num_tokens * tile_size


def peak_bytes(case: Case, divergence: Divergence, tile_size: int) -> int:
    """Return the peak of allocated memory, above the start, of a forward and backward pass with a constant head."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        outputs, *_ = run(case, divergence, live=False, implementation=tiles(tile_size), labels_N=None)
        loss(outputs, case.upstream).backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_two_tile_buffers_and_two_of_the_students_size(kind: str) -> None:
    num_tokens, tile_size = 1000, 192
    case = make_case(num_tokens, 1000).to(torch.float32)
    tiles, states = 2 * num_tokens * tile_size, 3 * case.student.numel()  # two kept, the leaf of `run`
    blocks = (
        (3 if Divergence(kind).one_sweep else 9) * num_tokens * tile_size // 8
    )  # temporaries are an eighth
    per_token = 100 * num_tokens
    used = peak_bytes(case, Divergence(kind), tile_size)
    assert 4 * tiles < used < 4 * (tiles + states + blocks + per_token)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_head_keeps_one_tensor_of_the_students_size_per_gradient(kind: str) -> None:
    case = make_case(100, 50).to(torch.float32)
    for temperature, needs_lse in ((1.0, True), (1.0, False), (2.0, True), (2.0, False)):
        divergence = Divergence(kind, temperature=temperature)
        outputs, hidden, _ = run(case, divergence, live=False, labels_N=None, needs_lse=needs_lse)
        heads = (case.student_head.shape, case.teacher_head.shape)
        saved = outputs.divergence_N.grad_fn.saved_tensors
        kept = [tensor for tensor in saved if tensor is not None and tensor.shape not in heads]
        storages = {tensor.data_ptr(): tensor.untyped_storage() for tensor in kept}
        distinct = {storage.data_ptr(): storage.nbytes() for storage in storages.values()}
        assert sum(distinct.values()) == (1 + needs_lse) * hidden.nbytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "'kl' is unknown.*fkl"),
        ({"kind": "jsd", "mix": 1.0}, "1.0: it must lie between 0 and 1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
    ],
)
def test_bad_divergence(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Divergence(**arguments)


def test_divergence_of_log_probabilities_matches_by_hand() -> None:
    """Check the reference itself on numbers that can be computed by hand: T = (1/2, 1/2), S = (1/4, 3/4)."""
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    value = reference_divergence(teacher, log_softmax(student, -1), Divergence("fkl"))
    assert value.item() == pytest.approx(0.143841, abs=1e-6)
    value = reference_divergence(teacher, student, Divergence("rkl"))
    assert value.item() == pytest.approx(0.130812, abs=1e-6)
    value = reference_divergence(teacher, student, Divergence("jsd"))
    assert value.item() == pytest.approx(0.033822, abs=1e-6)


@pytest.mark.parametrize("kind", ["fkl", "rkl"])
def test_skipped_tiles_change_the_gradient_little_and_nothing_else(kind: str) -> None:
    """The logits are so far apart that most tiles hold none of a token's probability."""
    case = make_case(60, 400).to(torch.float32)
    case.student.mul_(6)
    case.teacher.mul_(6)
    errors, taken = [], []
    exact, hidden, _ = run(case, Divergence(kind), live=False)
    (wanted,) = gradients(loss(exact, case.upstream), hidden)
    for skip_below in (1e-30, 1e-6, 1e-3, 0.3):
        implementation = Implementation("torch", tile_size=16, skip_below=skip_below)
        with Products() as products:
            ours, hidden, _ = run(case, Divergence(kind), live=False, implementation=implementation)
        for value, reference in zip(ours, exact, strict=True):
            assert torch.equal(value, reference)
        (gradient,) = gradients(loss(ours, case.upstream), hidden)
        errors.append(error(gradient, wanted.double()))
        taken.append(products.total)
    assert errors[0] < 1e-6 < errors[2] < errors[3], "a bound of 0.3 must show"
    assert errors[1] < 1e-5
    assert errors[2] < 1e-2
    assert taken == sorted(taken, reverse=True)
    assert taken[1] < 0.9 * taken[0], "and products must be spared"
