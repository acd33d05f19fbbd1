"""Exact conversion between Hugging Face and Megatron: each family of models is a table that is read both ways."""

import megatron_fdd.host.quiet  # noqa: F401  # before Megatron is imported
from megatron_fdd.convert.config_only import config_to_mcore
from megatron_fdd.convert.dense_student import DensePlan
from megatron_fdd.convert.hf_companions import HF_FOLDER, carry_companions
from megatron_fdd.convert.hf_writer import check_new_folder
from megatron_fdd.convert.importance import measure_importance
from megatron_fdd.convert.replace_vocabulary import replace_vocabulary
from megatron_fdd.convert.student import (
    StudentPlan,
    choose_layers,
    count_layers,
    init_student,
    parse_layers,
)
from megatron_fdd.convert.to_hf import mcore_to_hf
from megatron_fdd.convert.to_mcore import hf_to_mcore

__all__ = [
    "HF_FOLDER",
    "DensePlan",
    "StudentPlan",
    "carry_companions",
    "check_new_folder",
    "choose_layers",
    "config_to_mcore",
    "count_layers",
    "hf_to_mcore",
    "init_student",
    "mcore_to_hf",
    "measure_importance",
    "parse_layers",
    "replace_vocabulary",
]
