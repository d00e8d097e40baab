"""Policies by name."""

from .base import Policy
from .rank import DisabledPolicy, HeuristicPolicy, MiddlePolicy, OraclePolicy, RandomPolicy
from .reinforce import ReinforcePolicy

POLICIES: dict[str, type[Policy]] = {
    "reinforce": ReinforcePolicy,
    "random": RandomPolicy,
    "middle": MiddlePolicy,
    "heuristic": HeuristicPolicy,
    "oracle": OraclePolicy,
    "disabled": DisabledPolicy,
}


def build_policy(
    name: str,
    block_size: int = 128,
    percent_target: float = 0.5,
    quantize_percentage: float = 1 / 16,
    sparsity_weight: float = 1.0,
    budgets: tuple[float, float] | None = None,
    normalise_advantage: bool = False,
    entropy_weight: float = 0.0,
    warmup_share: float | None = None,
    recolour: bool = False,
    place_weight: float = 0.0,
    budget_power: float = 1.0,
) -> Policy:
    """A policy by name, with the published defaults.

    Args:
        name: reinforce, random, middle, heuristic, oracle or disabled.
        block_size: side of a high block in image pixels, even; a multiple of twice the network's
            stride.
        percent_target: wanted share of high blocks, 0 to 1 (for heuristic and oracle: the value
            their score is compared with).
        quantize_percentage: the number of high blocks is rounded up to a multiple of this share.
        budgets: lowest and highest share; every batch in training gets one of six from
            one to the other.
        budget_power: above 1, those near the lowest more often.
        sparsity_weight, normalise_advantage, entropy_weight, warmup_share, recolour, place_weight:
            how `reinforce` learns, see `ReinforcePolicy`; the other policies do not learn and take
            no notice.

    Raises:
        ValueError: unknown name, or a value out of range.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; choose one of {', '.join(POLICIES)}")
    settings = {
        "block_size": block_size,
        "percent_target": percent_target,
        "quantize_percentage": quantize_percentage,
        "budgets": budgets,
        "budget_power": budget_power,
    }
    if POLICIES[name].learns:
        settings |= {
            "sparsity_weight": sparsity_weight,
            "normalise_advantage": normalise_advantage,
            "entropy_weight": entropy_weight,
            "warmup_share": warmup_share,
            "recolour": recolour,
            "place_weight": place_weight,
        }
    return POLICIES[name](**settings)
