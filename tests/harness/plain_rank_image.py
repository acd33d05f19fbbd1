"""The image of `tests.harness.rank_image`, with Megatron's plain modules.

They are those of a GPU without apex and TransformerEngine.
"""

from unittest.mock import patch

from megatron_fdd.host import rehearsal

with patch("megatron_fdd.host.patches.norms.install_norms"):
    rehearsal.start()
