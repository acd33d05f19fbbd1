"""As `tests.harness.rank_image`, with Megatron's modules as they are on a GPU without apex and TransformerEngine."""

from unittest.mock import patch

from megatron_fdd.host import rehearsal

with patch("megatron_fdd.host.patches.norms.install_norms"):
    rehearsal.start()
