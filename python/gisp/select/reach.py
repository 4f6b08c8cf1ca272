"""Whether a run can get where it is asked to."""

from __future__ import annotations

from gisp.config.options import OFFICIAL_RATIO, PruneConfig
from gisp.errors import GispError
from gisp.model.structures import ModelMap
from gisp.select.selector import Selector
from gisp.select.whole_layers import LayerSelector


def check_reach(selector: Selector, model_map: ModelMap, config: PruneConfig, sparsity: float) -> None:
    """Require a sparsity, or the ratio of ``official``, that the unprotected structures allow.

    Raises:
        GispError: more than can be removed, or less than one layer where whole layers go.
    """
    where = f"with {selector.size - selector.unprotected} of {selector.size} structures protected"
    if config.schedule == "structures":
        ratio = float(config.ratio or OFFICIAL_RATIO)
        if selector.out_of_reach(ratio):
            raise GispError(f"ratio {ratio} is out of reach {where}: lower --ratio or protect fewer layers")
    most = selector.removable_parameters / model_map.decoder_parameters
    if isinstance(selector, LayerSelector) and config.schedule == "parameters":
        one = selector.layer_parameters / model_map.decoder_parameters
        if sparsity < one:
            raise GispError(
                f"sparsity {sparsity} is less than one layer, which is {one:.4f}: whole layers go with "
                f"--criterion {config.criterion}, give more"
            )
    if sparsity > most:
        raise GispError(
            f"sparsity {sparsity} is out of reach: at most {most:.4f} {where}, lower --sparsity or protect fewer layers"
        )
