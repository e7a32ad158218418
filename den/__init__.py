"""Deep Elastic Networks: each image chooses, block by block, the channels to run (arXiv 1909.04860)."""

from den.backbones import list_models
from den.checkpoint import load, save
from den.dense import dense
from den.flops import cost_ratios, count_parameters, flops
from den.freeze import FrozenDEN, freeze
from den.hierarchy import Hierarchy
from den.model import DEN, DENOutput, create_model

__version__ = "0.1.0"

__all__ = [
    "DEN",
    "DENOutput",
    "FrozenDEN",
    "Hierarchy",
    "cost_ratios",
    "count_parameters",
    "create_model",
    "dense",
    "flops",
    "freeze",
    "list_models",
    "load",
    "save",
]
