"""The benchmarks of the losses: all implementations do the same work, and tiny runs end well."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from benchmarks import delta_steps, interleaved, linear_kl, linear_kl_steps, lines, loss_groups, measure


def test_implementations_that_differ_are_noticed() -> None:
    size = linear_kl.SMOKE
    linear_kl.check({"ours": linear_kl_steps.our_objective}, size, whole=True)
    linear_kl.check(
        {"ours": linear_kl_steps.our_final, "plain": linear_kl_steps.plain_final}, size, whole=False
    )
    with pytest.raises(SystemExit, match="not the same work"):
        linear_kl.check({"final": linear_kl_steps.our_final}, size, whole=True)


def test_tiny_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with patch.object(measure, "RESULTS", tmp_path / "results"):
        assert linear_kl.main(["--smoke", "--repeats", "1", "--no-plain"]) == 0
    printed = capsys.readouterr().out
    for name in (linear_kl.FLOOR, linear_kl.OURS, linear_kl.PER_TOKEN):
        assert name in printed
    assert not (tmp_path / "results").exists(), "a trial is not recorded"


def test_peak_counts_what_a_call_allocates() -> None:
    def call() -> None:
        kept = torch.ones(2**18)
        torch.ones(2**20).add_(1)
        kept.add_(1)

    assert measure.peak_of(call) == pytest.approx(5.0, rel=0.01)


def test_no_ratio_of_unsteady_times() -> None:
    steady, unsteady = measure.summary([1.0, 1.01, 1.02], 1.0), measure.summary([1.0, 1.2, 1.1], 1.0)
    assert "unsteady" not in measure.table({"a": steady}, "a")
    assert measure.table({"a": steady, "b": unsteady}, "a").count("unsteady") == 1
    assert measure.table({"a": unsteady, "b": steady}, "a").count("unsteady") == 2


def test_variants_take_turns_and_a_later_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def broken(_size: linear_kl_steps.Size) -> linear_kl_steps.Step:
        raise RuntimeError("made to fail")

    def named(name: str) -> linear_kl_steps.Step:
        return lambda: calls.append(name) or torch.zeros(())

    size = linear_kl.SMOKE
    first = loss_groups.Group(
        "first",
        (
            loss_groups.Variant("floor", lambda: named("a"), size, work=1e9),
            loss_groups.Variant("ours", lambda: named("b"), size, "floor"),
            loss_groups.Variant("broken", lambda: broken(size), size, "floor"),
        ),
    )
    second = loss_groups.Group("second", (loss_groups.Variant("ours", lambda: named("c"), size),))
    monkeypatch.setattr(interleaved, "groups", lambda _scale: iter([first]))
    path = tmp_path / "lines"
    assert interleaved.main(["--lines", str(path), "--rounds", "3"]) == 1
    assert calls == ["a", "a", "b", "b", *"ababab"], "to warm up, for the memory, then in turn"
    floor, ours, failed = lines.read(path, "loss")
    assert "ratio" not in floor
    assert floor["rate"] == pytest.approx(1e9 / floor["seconds"])
    assert ours["floor"] == "floor"
    assert ours["ratio"] > 0
    assert failed["error"] == "RuntimeError: made to fail"
    monkeypatch.setattr(interleaved, "groups", lambda _scale: iter([first, second]))
    assert interleaved.main(["--lines", str(path)]) == 0
    assert [line["group"] for line in lines.read(path)] == ["first"] * 3 + ["second"]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert interleaved.main(["--lines", str(path)]) == 1
    assert [line["group"] for line in lines.read(path)][3:] == ["first"] * 3, "a row was missing: all anew"
    capsys.readouterr()


def test_the_deltas_products_are_those_of_its_factors() -> None:
    size = linear_kl.SMOKE
    bare, ours = delta_steps.bare_delta(size)(), delta_steps.our_products(size)()
    torch.testing.assert_close(ours, bare.float(), rtol=0, atol=1e-2 * float(ours.abs().max()))


def test_steps_of_a_size_share_their_inputs() -> None:
    one, other = (linear_kl_steps.inputs(linear_kl.SMOKE, trains_head=trains) for trains in (False, True))
    assert one.teacher_head_WT is other.teacher_head_WT
    assert one.student_head_WD.data_ptr() == other.student_head_WD.data_ptr()
    assert (one.student_head_WD.requires_grad, other.student_head_WD.requires_grad) == (False, True)
    assert all(hidden.is_leaf and hidden.requires_grad for hidden in (*one.student, *other.student))
