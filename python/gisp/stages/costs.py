"""What layers cost, from their present widths: every process counts alike."""

from __future__ import annotations

from gisp.model.structures import LayerMap, ModelMap
from gisp.stages.placement import LayerCosts

# A message between stages, in weights a token of one hidden size: at 200 GB/s it takes as long as so many products.
_MESSAGE = 3000


def layer_costs(model_map: ModelMap, lowest: int) -> LayerCosts:
    """Weights that a token is multiplied with in every layer, forward and backward.

    Args:
        lowest: number of the lowest layer that is scored; its gates need half of a backward, layers below none.
    """
    hidden = model_map.hidden_size
    forward = [_weights(item) + hidden for item in model_map.layers]
    backward = [0.0 if i < lowest else cost / 2 if i == lowest else cost for i, cost in enumerate(forward)]
    # The end gives loss and gradient in one go.
    forward[-1] += 2 * model_map.vocab_size * hidden
    return LayerCosts(tuple(forward), tuple(backward), _MESSAGE * hidden)


def _weights(item: LayerMap) -> float:
    linears = {projection.linear for group in (item.heads, item.channels) for projection in group.projections}
    # Shared keys and values belong to no structure.
    linears |= {item.attention.k_proj, item.attention.v_proj}
    return float(sum(linear.weight.numel() for linear in linears))
