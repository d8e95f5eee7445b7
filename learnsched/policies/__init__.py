"""Policies: what makes the settings of a run. One file a family."""

from learnsched.policies.annealing import AdditiveNoiseAnnealing
from learnsched.policies.annealing_grid import annealing_grid
from learnsched.policies.base_curve import BaseCurve
from learnsched.policies.base_curves import BaseCurves, Case
from learnsched.policies.domain import Domain
from learnsched.policies.incremental import IncrementalQuantization
from learnsched.policies.learned import LearnedPolicy
from learnsched.policies.meta_network import MetaNetwork
from learnsched.policies.piecewise_affine import PiecewiseAffine
from learnsched.policies.relaxed import Relaxed
from learnsched.policies.relaxed_quantization import RelaxedQuantization
from learnsched.policies.straight_through import StraightThrough

__all__ = [
    "AdditiveNoiseAnnealing",
    "BaseCurve",
    "BaseCurves",
    "Case",
    "Domain",
    "IncrementalQuantization",
    "LearnedPolicy",
    "MetaNetwork",
    "PiecewiseAffine",
    "Relaxed",
    "RelaxedQuantization",
    "StraightThrough",
    "annealing_grid",
]
