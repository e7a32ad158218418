"""The backbone families, a file each, and the registry of their names.

A family is a function decorated with `register`; every module of this package is imported with it.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass

from den.estimator import Estimator


@dataclass(frozen=True)
class Family:
    """One family of backbones.

    pattern: regular expression of its names; its groups are whole numbers, passed to `build` after the options.
    names: the names worth listing.
    ratios: level ratios when the caller gives none.
    base_size: image size that the family is made for.
    build: (EstimatorOptions, *numbers, **keywords) -> Estimator.
    """

    pattern: re.Pattern[str]
    names: tuple[str, ...]
    ratios: tuple[float, ...]
    base_size: int | None
    build: Callable[..., Estimator]

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the keyword-only arguments of the family's own."""
        parameters = inspect.signature(self.build).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


_FAMILIES: list[Family] = []


def register(
    pattern: str,
    *,
    names: tuple[str, ...],
    ratios: tuple[float, ...] = (0, 0.25, 0.5, 1),
    base_size: int | None = 32,
) -> Callable[[Callable[..., Estimator]], Callable[..., Estimator]]:
    """Decorator: the function builds the backbones whose whole name matches `pattern`; see `Family`."""

    def add(build: Callable[..., Estimator]) -> Callable[..., Estimator]:
        _FAMILIES.append(Family(re.compile(pattern), names, ratios, base_size, build))
        return build

    return add


def list_models(pattern: str = "*") -> list[str]:
    """Names of backbones that match a shell pattern such as "wrn*", sorted, numbers by value.

    Families of numbered names build more than they list: any `wrn_{l}_{r}` with l = 6n + 2 exists.
    """
    names = [name for family in _FAMILIES for name in family.names if fnmatch.fnmatch(name, pattern)]
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def find(name: str) -> tuple[Family, tuple[int, ...]]:
    """The family of a name and the numbers in it.

    Raises:
        TypeError: name is not a string.
        ValueError: no family has the name; the message lists near ones.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}; it must be a string such as 'wrn_32_4'")
    for family in _FAMILIES:
        match = family.pattern.fullmatch(name)
        if match:
            return family, tuple(int(number) for number in match.groups() if number is not None)
    known = list_models()
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known
    raise ValueError(f"name is {name!r}; no such backbone. Near: {', '.join(near)}. den.list_models() lists them")


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
