"""Policies: which blocks of an image run at full resolution."""

from .base import BudgetError, Decision, Policy
from .build import POLICIES, build_policy
from .network import PolicyNet
from .rank import HeuristicPolicy, MiddlePolicy, OraclePolicy, RandomPolicy
from .reinforce import ReinforcePolicy

__all__ = [
    "POLICIES",
    "BudgetError",
    "Decision",
    "HeuristicPolicy",
    "MiddlePolicy",
    "OraclePolicy",
    "Policy",
    "PolicyNet",
    "RandomPolicy",
    "ReinforcePolicy",
    "build_policy",
]
