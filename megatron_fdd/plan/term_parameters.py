"""The parameters of terms, compared between a checkpoint and the run: those that are resumed, missing or left out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from megatron_fdd.config.values import parse_layer_pairs
from megatron_fdd.host.checkpoint import TERM_PREFIX, term_shapes
from megatron_fdd.host.listing import listing
from megatron_fdd.losses.pairs import plan_pairs
from megatron_fdd.losses.term_modules import saved_shapes
from megatron_fdd.plan.context import Context, StoredModel

Shapes = Mapping[str, tuple[int, ...]]


def fresh_parameters(context: Context) -> frozenset[str]:
    """Name the parameters that the student's checkpoint lacks, or has for other widths; they start from new values."""
    stored = context.stored_student
    if stored is None:
        return frozenset()
    here, there = _of_run(context), term_shapes(stored.path, stored.flag)
    return frozenset(name for name, shape in here.items() if there.get(name) != shape)


def check_term_parameters(context: Context) -> None:
    """Refuse to resume with terms that have other parameters: the optimizer's state would not fit.

    Raises:
        ValueError: names the parameters that only the run has, and those that only the checkpoint has.
    """
    stored = context.stored_student
    if stored is None or not context.resumes_optimizer:
        return
    here, there = _of_run(context), term_shapes(stored.path, stored.flag)
    if here and there:
        _check_same_layers(context, stored)
    differences = {
        "only there": there.keys() - here.keys(),
        "only here": here.keys() - there.keys(),
        "of another shape": {name for name in here.keys() & there.keys() if here[name] != there[name]},
    }
    told = [f"{where}: {listing(sorted(names))}" for where, names in differences.items() if names]
    if told:
        raise ValueError(
            f"{stored.flag} {stored.folder}: its terms learn something else than this run's ({'; '.join(told)}); give "
            "the same --fdd-plugin, --fdd-term and --fdd-layers, or take the weights alone with --finetune"
        )


def _check_same_layers(context: Context, stored: StoredModel) -> None:
    """Refuse to give what a term learned for one layer to another layer, which has the same name and shape."""
    plan, teacher = context.plan, context.teacher_size
    assert plan is not None, "the phase is made when it is known"
    assert teacher is not None, "the run has terms"
    try:
        config = replace(
            plan.config,
            layers=stored.args.fdd_layers,
            layer_rule=stored.args.fdd_layer_rule,
            layer_pairs=parse_layer_pairs(stored.args.fdd_layer_pairs),
        )
        pairs = plan_pairs(config, context.args.num_layers, teacher.num_layers)
    except (AttributeError, TypeError, ValueError):  # of another version, or of another teacher
        return
    if len(pairs) == len(plan.pairs) and pairs != plan.pairs:
        there, here = (", ".join(pair.name for pair in each) for each in (pairs, plan.pairs))
        raise ValueError(
            f"{stored.flag} {stored.folder}: its terms learned for the layers {there}, and this run compares {here}; "
            "give the same layers, or take the weights alone with --finetune"
        )


def warn_of_left_out_terms(context: Context) -> None:
    """Warn, on rank 0, of parameters of terms in a checkpoint that this run does not take from it."""
    if context.args.rank != 0:
        return
    student, teacher = context.stored_student, context.stored_teacher
    if student is not None:
        here = _of_run(context)
        _warn(student, {n: s for n, s in term_shapes(student.path, student.flag).items() if here.get(n) != s})
    if teacher is not None:
        _warn(teacher, term_shapes(teacher.path, teacher.flag))


def _of_run(context: Context) -> Shapes:
    plan, teacher = context.plan, context.teacher_size
    assert plan is not None, "the phase is made when it is known"
    if teacher is None:
        return {}
    widths = context.args.hidden_size, teacher.hidden_size
    return {
        TERM_PREFIX + name: shape
        for name, shape in saved_shapes(plan.config, len(plan.pairs), widths).items()
    }


def _warn(stored: StoredModel, left_out: Shapes) -> None:
    if left_out:
        warnings.warn(
            f"{stored.flag} {stored.folder}: holds {len(left_out)} parameters of terms that are not taken from it: "
            f"{listing(sorted(left_out))}",
            stacklevel=2,
        )
