"""The program that `test_transformer_engine.py` runs: it passes checkpoints through TransformerEngine's modules.

    python -m tests.convert.te_model FROM TO [FROM TO ...]

loads each checkpoint into a GPTModel of TransformerEngine's modules, with and without grouped experts, and saves that
model as a training run would. It handles only weights, so that no GPU is needed.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from pathlib import Path

import torch

# This import comes before the rehearsal, which hides modules that are not imported yet.
if importlib.util.find_spec("transformer_engine"):
    pass
else:
    import tests.transformer_engine.rank_image  # noqa: F401

from megatron.core import dist_checkpointing

from megatron_fdd.host import rehearsal
from megatron_fdd.host.checkpoint import find_checkpoint, read_checkpoint_args
from megatron_fdd.host.weights import load_weights

_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def local_name(name: str) -> str:
    """Return the local name of a parameter of TransformerEngine's modules.

    Those modules have norms inside linears, and all experts in one module.
    """
    name = re.sub(
        r"experts\.linear_fc(\d)\.(weight|bias)(\d+)$", r"experts.local_experts.\3.linear_fc\1.\2", name
    )
    return name.replace("linear_qkv.layer_norm_", "NORM").replace("linear_fc1.layer_norm_", "NORM")


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every parameter by its local name."""
    norms = {"input_layernorm.": "self_attention.NORM", "pre_mlp_layernorm.": "mlp.NORM"}
    found = {}
    for name, parameter in model.named_parameters():
        name = local_name(name)
        for norm, inside in norms.items():
            name = name.replace(norm, inside)
        found[name] = parameter.detach()
    return found


def through_transformer_engine(source: Path, target: Path) -> None:
    """Load a checkpoint, compare it with Megatron's local modules, and save it."""
    from megatron_fdd.convert.mcore_model import build_model
    from megatron_fdd.convert.ranks import conversion_ranks

    with conversion_ranks() as groups:
        path = find_checkpoint(str(source), "--load")
        args = read_checkpoint_args(path, "--load")
        wanted_model = build_model(copy.copy(args), groups)
        load_weights(wanted_model, path, "--load", groups)
        wanted = values(wanted_model)
        for grouped in (False, True) if args.num_experts else (False,):
            theirs = copy.copy(args)
            theirs.transformer_impl, theirs.moe_grouped_gemm = "transformer_engine", grouped
            model = build_model(theirs, groups)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float("nan"))
            load_weights(model, path, "--load", groups)
            found = values(model)
            assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
            assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
            modules = {type(module).__name__ for module in model.modules()}
            norms_before = args.fdd_layer_spec not in ("olmo2", "cohere2")
            assert ("TELayerNormColumnParallelLinear" in modules) == norms_before
            assert "TEColumnParallelLinear" in modules or norms_before
            assert ("TEColumnParallelGroupedLinear" in modules) == grouped
            folder = target / ("grouped" if grouped else "plain")
            (folder / "release").mkdir(parents=True)
            state = {"args": theirs, "checkpoint_version": 3.0, "iteration": 0}
            state["model"] = model.sharded_state_dict(metadata={**_CONTENT, "dp_cp_group": groups.dp_cp})
            dist_checkpointing.save(state, str(folder / "release"), content_metadata=_CONTENT)
            (folder / "latest_checkpointed_iteration.txt").write_text("release")


if __name__ == "__main__":
    rehearsal.start()
    for index in range(1, len(sys.argv), 2):
        through_transformer_engine(Path(sys.argv[index]), Path(sys.argv[index + 1]))
        print(sys.argv[index], flush=True)
