"""An import of a fork server, which makes Megatron read the help texts of its flags from its sources only once.

A run of the entry point makes the parser twice, 0.2 s each time, and most of that is this reading.
"""

import argparse
import functools

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments

# The result depends only on the class, and nobody changes it.
_of_class = functools.cache(
    functools.partial(
        ArgumentGroupFactory._get_field_docstrings, ArgumentGroupFactory.__new__(ArgumentGroupFactory)
    )
)


def _get_field_docstrings(_factory: ArgumentGroupFactory | None, config: type) -> dict[str, str]:
    return _of_class(config)


ArgumentGroupFactory._get_field_docstrings = _get_field_docstrings
add_megatron_arguments(argparse.ArgumentParser())
