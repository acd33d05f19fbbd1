"""Whether transformers can read a config.json: what no family's table looks at can still be of the wrong type there."""

from __future__ import annotations

import copy

from megatron_fdd.convert.families.family import HfConfig


def check_config_class(config: HfConfig) -> None:
    """Refuse a config that transformers' class for it cannot read: every export would have it.

    Families that transformers does not have are not looked at.

    Raises:
        ValueError: names the field as transformers does.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        return
    try:
        CONFIG_MAPPING[kind].from_dict(copy.deepcopy(config))
    except Exception as error:  # a class may raise anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"config.json must be one that transformers can load, as every export of it must: {said}"
        ) from error
