"""Orders in which single tokens are predicted, other than the layout's own: checks, training's, known tokens first.

A prior trained on random orders uses both sides of a token (RAR, arXiv:2411.00776). An order lists the L tokens by
their places in block order: orders[b, j] is the one that is predicted j-th. Legend: B images, L all tokens.
"""

from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from nextblock.data.given import check_tensor
from nextblock.data.keyed_random import keyed_uniform

RASTER = "raster"
Order = str | tuple[int, ...]
# Apart from other numbers that are drawn of seed, step and sample.
_CHOICE_KEY, _ORDER_KEY = 1, 2


@dataclass(kw_only=True)
class OrderConfig:
    """In which orders a prior that takes orders learns to predict an image's tokens; others learn block order alone."""

    random_until_step: int = 0
    """Up to this step every sample is predicted in a random order, drawn anew at every step; after it the share of such
    samples falls linearly."""
    raster_from_step: int = 0
    """From this step on all samples are predicted in raster order; 0 with `random_until_step` 0 from the first."""

    def __post_init__(self):
        if not 0 <= self.random_until_step <= self.raster_from_step:
            raise ValueError(
                f"random_until_step is {self.random_until_step} and raster_from_step {self.raster_from_step}; expected "
                "numbers of steps from 0, the second not below the first"
            )

    def random_share(self, step: int) -> float:
        """Return the probability that a sample of a step, numbered from 0, is predicted in a random order."""
        if step >= self.raster_from_step:
            return 0.0
        return min(1.0, (self.raster_from_step - step) / max(self.raster_from_step - self.random_until_step, 1))


def training_orders(config: OrderConfig, num_tokens: int, seed: int, step: int, samples: Tensor) -> Tensor | None:
    """Draw the orders that a batch is predicted in, a function of seed, step and the samples' numbers alone.

    Args:
        config: how many are random.
        num_tokens: L.
        seed: of the run.
        step: number of the training step, from 0.
        samples: (B,) int64 numbers of the samples in the data set.

    Returns:
        (B, L) int64; None where all are in raster order for certain.
    """
    share = config.random_share(step)
    if share == 0:
        return None
    tokens = torch.arange(num_tokens, device=samples.device)
    keys = keyed_uniform(seed, step, _ORDER_KEY, samples=samples[:, None] * num_tokens + tokens)
    is_random = keyed_uniform(seed, step, _CHOICE_KEY, samples=samples) < share
    return torch.where(is_random[:, None], keys.argsort(dim=1, stable=True), tokens)


def takes_orders(prior: Any) -> bool:
    """Tell whether a prior predicts its tokens in any order; a family that does not say so does not."""
    return getattr(prior, "takes_orders", False)


def refuse_orders(prior: Any, orders: Tensor | None) -> None:
    """Refuse orders for a family that predicts blocks in the layout's order alone.

    Raises:
        ValueError: naming the family.
    """
    if orders is not None:
        raise ValueError(f"orders is given; expected None for {type(prior).__name__}, which predicts in block order")


def check_orders(orders: Tensor, num_rows: int, num_tokens: int) -> None:
    """Refuse what is no permutation in every row; values on a GPU are not waited for.

    Args:
        orders: (B, L) int64.
        num_rows: B.
        num_tokens: L.

    Raises:
        ValueError: naming what was expected.
    """
    expected = f"torch.int64 {(num_rows, num_tokens)}, in every row a permutation of 0 to {num_tokens - 1}"
    check_tensor("orders", orders, expected)
    if tuple(orders.shape) != (num_rows, num_tokens) or orders.dtype != torch.int64:
        raise ValueError(f"orders is {orders.dtype} {tuple(orders.shape)}; expected {expected}")
    if orders.device.type == "cpu":
        is_wrong = (orders.sort(dim=1).values != torch.arange(num_tokens)).any(dim=1)
        if is_wrong.any():
            row = is_wrong.nonzero()[0].item()
            raise ValueError(f"orders[{row}] is {orders[row].tolist()!s:.80}; expected {expected}")


def read_order(order: Any) -> Order:
    """Read an order as people give it.

    Args:
        order: "raster", or a permutation of the tokens as a list, a tuple, an array or a tensor (L,).

    Returns:
        "raster", or the permutation as a tuple.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(order, str) and order == RASTER:
        return RASTER
    # Arrays and tensors alike.
    listed = order.tolist() if hasattr(order, "tolist") else order
    is_listed = isinstance(listed, (list, tuple, range)) and all(
        isinstance(place, Integral) and not isinstance(place, bool) for place in listed
    )
    if not is_listed or sorted(listed) != list(range(len(listed))) or not listed:
        raise ValueError(f"order is {order!r:.80}; expected {RASTER!r}, or a permutation of the tokens 0 to L - 1")
    return tuple(map(int, listed))


def check_order_for(prior: Any, order: Order) -> None:
    """Refuse an order that a prior cannot follow.

    Raises:
        ValueError: naming the family, or the number of tokens expected.
    """
    if order == RASTER:
        return
    if not takes_orders(prior):
        raise ValueError(
            f"order is {order!r:.80}; expected {RASTER!r} for {type(prior).__name__}, which predicts in block order"
        )
    if len(order) != prior.layout.num_tokens:
        raise ValueError(f"order has {len(order)} entries; expected {prior.layout.num_tokens}, one a token")


def sampling_orders(prior: Any, order: Order, given_idx_BL: Tensor | None, num_images: int) -> Tensor | None:
    """Return the orders that a batch is sampled in: as asked, but known tokens first, so that all others see them.

    Args:
        prior: of any family.
        order: "raster", or a permutation.
        given_idx_BL: (B, L) known tokens, −1 for those to sample; or None.
        num_images: B.

    Returns:
        (B, L) int64 on the prior's device; None is block order.
    """
    if not takes_orders(prior) or (order == RASTER and given_idx_BL is None):
        return None
    asked = torch.arange(prior.layout.num_tokens) if order == RASTER else torch.tensor(order)
    orders = asked.to(prior.device).expand(num_images, -1)
    if given_idx_BL is None:
        return orders
    is_unknown = (given_idx_BL < 0).gather(1, orders)
    return orders.gather(1, is_unknown.to(torch.uint8).argsort(dim=1, stable=True))


def in_order(values: Tensor, orders: Tensor | None) -> Tensor:
    """Bring values (B, L, …) from block order into that of their prediction; None leaves them."""
    return values if orders is None else _taken(values, orders)


def in_block_order(values: Tensor, orders: Tensor | None) -> Tensor:
    """Bring values (B, L, …) from the order of their prediction back into block order; None leaves them."""
    return values if orders is None else _taken(values, orders.argsort(dim=1))


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """Take values (B, L, …) at places (B, n) of their second dimension."""
    return values.gather(1, places.view(*places.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:]))
