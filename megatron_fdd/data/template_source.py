"""The program text of a chat template: compiled by transformers, and looked at for marks and for costly constants."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Literal

from megatron_fdd.data.render_limits import limited
from megatron_fdd.host.field_kinds import shown

if TYPE_CHECKING:
    from jinja2 import Template, nodes

MarkPlaces = Literal["none", "in order", "apart"]
_LARGEST_NUMBER = 10_000_000
# A width in a text for `format`, such as "%099999999d".
_WIDTH = re.compile(r"[%:][^A-Za-z]*[0-9]{8,}")


def compiled(source: str) -> Template:
    """Return transformers' compiled template.

    transformers caches it, so its environment is the one used for rendering.

    Raises:
        ValueError: the template computes something that can take hours, or fill the memory; it need not be tried.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    costly = _costly(source)
    if costly is not None:
        raise ValueError(f"it has {costly}, which can take hours; write the template without it")
    return _compile_jinja_template(source)


@functools.cache
def _costly(source: str) -> str | None:
    """Return what is too costly in a template; it is not compiled, because the compiler computes constants."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    tree = _compile_jinja_template("").environment.parse(source)
    if tree.find(nodes.Pow) is not None:
        return "a power (**)"
    for constant in tree.find_all(nodes.Const):
        value = constant.value
        if isinstance(value, int | float) and abs(value) > _LARGEST_NUMBER:
            return f"the number {shown(value)}"
        if isinstance(value, str) and _WIDTH.search(value):
            return f"the width in {shown(value)}"
    return None


@functools.cache
def mark_places(source: str) -> MarkPlaces:
    """Return where a template has its marks; "apart" means in a part that is rendered first and written later.

    The place of such a mark is lost: transformers counts the characters that were written before it.
    """
    if re.search(r"\bgeneration\b", source) is None:
        return "none"
    found: MarkPlaces = limited(source, _mark_places, source)
    return found


def _mark_places(source: str) -> MarkPlaces:
    from jinja2 import nodes

    apart = (nodes.Macro, nodes.CallBlock, nodes.AssignBlock, nodes.FilterBlock)
    found: MarkPlaces = "none"
    stack: list[tuple[nodes.Node, bool]] = [(compiled(source).environment.parse(source), False)]
    while stack:
        node, is_apart = stack.pop()
        if _is_generation(node):
            if is_apart:
                return "apart"
            found = "in order"
        inside = is_apart or isinstance(node, apart)
        stack.extend((child, inside) for child in node.iter_child_nodes())
    return found


def _is_generation(node: nodes.Node) -> bool:
    from jinja2 import nodes

    return (
        isinstance(node, nodes.CallBlock)
        and isinstance(node.call.node, nodes.ExtensionAttribute)
        and node.call.node.name == "_generation_support"
    )
