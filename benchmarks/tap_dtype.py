"""How rounding the teacher's taps changes every inner term and its gradient, on a real pair and text.

    python -m benchmarks.tap_dtype --teacher-hf DIR --student-hf DIR --text FILE

Taps of K sampled layers in float32 are rounded as `--fdd-tap-dtype` does, before the lens norms them; everything
after that is float32. A term's error is relative to its value, a gradient's (to the student's features of all
layers) to its norm. First comes what rounding does to the lens' predictions themselves: KL(teacher || teacher with
rounded taps), over tokens and layers, and the same for the last block's output, which only a store rounds
(`fdd teach --form`). A bf16 run rounds its taps to bf16 whatever the flag says: that row is the yardstick.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.pairs import LayerPair, sample_blocks
from megatron_fdd.losses.tap import Features, Tap, TapWindow, TokenWeights, measure
from megatron_fdd.losses.term import TapContext
from megatron_fdd.losses.terms import Delta
from megatron_fdd.ops.delta import head_grams
from megatron_fdd.ops.linear_kl import Divergence, Heads, VocabShard, linear_kl
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.hf_run import tapped

FORMS = ("logprob", "centred")
FORMATS = {
    "float32": TapFormat(torch.float32, "float32"),
    "bf16": TapFormat(torch.bfloat16, "bf16"),
    "fp8": TapFormat(torch.bfloat16, "fp8"),
    "int8": TapFormat(torch.bfloat16, "int8"),
}


def rounded(tap: Tensor, tap_format: TapFormat) -> Tensor:
    """Return a tap [S, B, width] in float32, packed and unpacked."""
    return tap_format.unpack(tap_format.pack(tap.to(tap_format.dtype)), tap.shape[-1]).float()


@torch.no_grad()
def features(model: PreTrainedModel, rows: Tensor, layers: int, folder: Path) -> list[Tensor]:
    """Return [S, B, width] of each sampled layer and of the last one, before the norm."""
    blocks = sample_blocks("paper", layers, model.config.num_hidden_layers, str(folder))
    with tapped([*(model.model.layers[block - 1] for block in blocks), model.model.layers[-1]]) as taps_BSH:
        model.model(rows)
    return [tap_BSH.transpose(0, 1) for tap_BSH in taps_BSH]


def terms(
    teacher: list[Tensor], student: list[Tensor], heads: Heads, form: str
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the means over tokens of trajectory and delta, and their gradients to the student's normed features."""
    leaves = [each.flatten(0, 1).detach().requires_grad_() for each in student]
    ones_N = torch.ones(len(leaves[0]))
    weights = TokenWeights(ones_N, ones_N)
    grams = head_grams(heads)
    context = TapContext(FddConfig(teacher_load="given", delta=form), heads, weights, lambda: grams)
    divergences, deltas, previous = [], [], None
    for index, (each, leaf) in enumerate(zip(teacher, leaves, strict=True), start=1):
        rows = each.flatten(0, 1)
        features = Features(rows, leaf, rows, leaf)
        divergence, statistics = measure(features, heads, Divergence(), weights, with_lse=form == "logprob")
        assert divergence is not None
        divergences.append(divergence)
        tap = Tap(LayerPair(index, index), features, divergence, statistics)
        if previous is not None:
            deltas.append(Delta().compute(TapWindow(tap, previous), context))
        previous = tap
    totals = {"trajectory": torch.stack(divergences).mean(), "delta": torch.stack(deltas).mean()}
    values = {name: total.item() / len(ones_N) for name, total in totals.items()}
    gradients = {
        name: torch.cat(torch.autograd.grad(total, leaves, retain_graph=True))
        for name, total in totals.items()
    }
    return values, gradients


@torch.no_grad()
def print_predictions(taps: dict[str, list[Tensor]], head: Tensor) -> None:
    """Print what rounding does to the predictions of the teacher's lens; `taps` are normed, by the name of the form."""
    heads = Heads(head, head, VocabShard(0, len(head), None))
    columns = f"{'mean KL, nats':>15}{'99 %':>10}{'99.9 %':>10}"
    print(
        f"{'':<22}{'sampled layers':^35}{'last block':^35}\n{'taps':<9}{'bytes a token':>13}{columns}{columns}"
    )
    for name, tap_format in FORMATS.items():
        line = f"{name:<9}{tap_format.token_bytes(head.shape[-1]):>13}"
        for part in (slice(-1), slice(-1, None)):
            exact_NT, rounded_NT = (torch.cat(taps[each][part]).flatten(0, 1) for each in ("float32", name))
            kl_N = linear_kl(exact_NT, rounded_NT, heads, divergence=Divergence()).divergence_N
            assert kl_N is not None, "asked for"
            tails = kl_N.quantile(torch.tensor([0.99, 0.999])).tolist()
            line += f"{kl_N.mean():>15.1e}{tails[0]:>10.1e}{tails[1]:>10.1e}"
        print(line)


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-hf", type=Path, required=True, help="folder of the teacher (Llama family)")
    parser.add_argument("--student-hf", type=Path, required=True, help="folder of the student")
    parser.add_argument("--text", type=Path, required=True, help="plain text")
    parser.add_argument("--tokens", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="sampled of each model (%(default)s)")
    return parser.parse_args()


def main() -> int:
    """Measure and print; return the exit status."""
    args = parsed()
    models = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)
        for f in (args.teacher_hf, args.student_hf)
    ]
    ids = AutoTokenizer.from_pretrained(args.teacher_hf)(
        args.text.read_text(), return_tensors="pt"
    ).input_ids[0]
    if len(ids) < args.tokens or args.tokens % 256:
        raise SystemExit(
            f"--text has {len(ids)} tokens, --tokens {args.tokens} must be below, and a multiple of 256"
        )
    rows = ids[: args.tokens].view(-1, 256)
    teacher = features(models[0], rows, args.layers, args.teacher_hf)
    with torch.no_grad():
        student = [
            models[1].model.norm(tap) for tap in features(models[1], rows, args.layers, args.student_hf)[:-1]
        ]
    teacher_head, student_head = (model.lm_head.weight.detach() for model in models)
    heads = Heads(teacher_head, student_head, VocabShard(0, len(teacher_head), None))
    print(
        f"torch {torch.__version__}; {args.tokens} tokens, {args.layers} layers, vocabulary {len(teacher_head)}\n"
    )
    with torch.no_grad():
        normed = {
            name: [models[0].model.norm(rounded(tap, tap_format)) for tap in teacher]
            for name, tap_format in FORMATS.items()
        }
    print_predictions(normed, teacher_head)
    print(f"\n{'taps':<9}{'term':<22}{'value':>9}{'off by':>10}{'gradient off by':>17}{'1 - cosine':>12}")
    exact: dict[tuple[str, str], tuple[float, Tensor]] = {}
    for name, taps in normed.items():
        for form in FORMS:
            values, gradients = terms(taps[:-1], student, heads, form)
            for term, value in values.items():
                if term == "trajectory" and form != FORMS[0]:
                    continue
                label = term if term == "trajectory" else f"delta ({form})"
                wanted, direction = exact.setdefault((term, form), (value, gradients[term]))
                error = (gradients[term] - direction).norm() / direction.norm()
                cosine = torch.nn.functional.cosine_similarity(
                    gradients[term].double().flatten(), direction.double().flatten(), 0
                )
                print(
                    f"{name:<9}{label:<22}{value:>9.4f}{value / wanted - 1:>10.1e}{error:>17.1e}{1 - cosine:>12.1e}"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
