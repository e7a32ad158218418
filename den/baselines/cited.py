"""Results that are cited, not run: N2N learning (Ashok et al. 2017, arXiv 1709.06030), as Table 5 of the paper prints
it. Its search over architectures by two reinforcement learners is another kind of method than those here."""

from __future__ import annotations

from typing import NamedTuple


class Cited(NamedTuple):
    """One row: method, backbone that was compressed, data set, accuracy in percent, parameters in millions, source."""

    method: str
    backbone: str
    dataset: str
    accuracy: float
    parameters: float
    source: str


_N2N = "Ashok et al., N2N Learning, arXiv 1709.06030; as printed in Table 5 of arXiv 1909.04860"

CITED = (
    Cited("n2n", "ResNet-18", "cifar10", 91.97, 2.12, _N2N),
    Cited("n2n", "ResNet-34", "cifar10", 93.54, 3.87, _N2N),
    Cited("n2n", "ResNet-18", "cifar100", 69.64, 4.76, _N2N),
    Cited("n2n", "ResNet-34", "cifar100", 70.11, 4.25, _N2N),
)
