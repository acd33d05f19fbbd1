"""What a model's logits have beside the product with its head: a bias, and a soft cap.

Shapes: R tokens, C columns of a tile, W rows of this rank's head shard.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadExtras:
    """The two steps from the product p = W x to a logit: z = c tanh((p + b) / c). Constants.

    The cap comes before any temperature.

    Attributes:
        bias_W: b, float32, a row of the head shard each; None: no bias.
        cap: c, positive; None: no cap.
    """

    bias_W: Tensor | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        assert self.cap is None or self.cap > 0, f"cap {self.cap}"

    def apply(self, products: Tensor, columns: slice | Tensor) -> None:
        """Turn products with some rows of the head, the last dimension, into logits, in place."""
        if self.bias_W is not None:
            products += self.bias_W[columns]
        self.squash(products)

    def squash(self, logits: Tensor) -> None:
        """Cap logits that have their bias already, in place."""
        if self.cap is not None:
            logits.mul_(1 / self.cap).tanh_().mul_(self.cap)

    def slope(self, logits: Tensor, temperature: float = 1.0) -> Tensor | None:
        """Return the derivative of capped logits with respect to products, 1 - (z / c)^2; None without a cap: it is 1.

        Args:
            logits: z over the temperature.
        """
        if self.cap is None:
            return None
        return (logits * (temperature / self.cap)).square_().neg_().add_(1.0)


NO_EXTRAS = HeadExtras()
