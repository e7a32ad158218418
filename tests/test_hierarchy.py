import pytest

from den.hierarchy import Hierarchy


@pytest.mark.parametrize(
    ("ratios", "channels", "groups", "widths"),
    [
        ((0, 0.25, 0.5, 1), 64, 1, (0, 16, 32, 64)),
        ((0, 0.5, 1), 16, 1, (0, 8, 16)),
        ((0.5, 1), 32, 1, (16, 32)),
        ((1,), 7, 1, (7,)),
        ((0, 0.25, 0.5, 1), 512, 8, (0, 128, 256, 512)),
        ((0.3, 1), 512, 4, (128, 512)),  # 1.2 groups
        ((0.4, 1), 512, 4, (256, 512)),  # 1.6 groups
        ((0.01, 1), 512, 4, (128, 512)),  # never less than a group
        ((0.5, 1), 5, 1, (3, 5)),  # halves round up
    ],
)
def test_widths_are_whole_groups(ratios, channels, groups, widths):
    assert Hierarchy(ratios).widths(channels, groups) == widths


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ((), "empty"),
        ((0.5, 0.25, 1), r"\(0.5, 0.25, 1\).*ascend"),
        ((0.5, 0.5, 1), "ascend strictly"),
        ((0, 0.5), "last ratio must be 1"),
        ((-0.5, 1), r"in \[0, 1\]"),
        ((0.5, 2), r"in \[0, 1\]"),
        ((float("nan"), 1), r"in \[0, 1\]"),
    ],
)
def test_bad_ratios_are_named(ratios, message):
    with pytest.raises(ValueError, match=message):
        Hierarchy(ratios)


@pytest.mark.parametrize("ratios", [0.5, "half", (0, "1"), (True,), None])
def test_ratios_of_the_wrong_type(ratios):
    with pytest.raises(TypeError, match="ratios"):
        Hierarchy(ratios)


def test_levels_that_coincide_are_refused():
    with pytest.raises(ValueError, match=r"2 channels the widths \(0, 1, 1, 2\)"):
        Hierarchy((0, 0.25, 0.5, 1)).widths(2)
    with pytest.raises(ValueError, match="positive multiple of groups"):
        Hierarchy((1,)).widths(10, 4)


def test_equality_and_repr():
    assert Hierarchy((0, 1)) == Hierarchy([0.0, 1.0])
    assert len({Hierarchy((0, 1)), Hierarchy((0, 1.0))}) == 1
    assert repr(Hierarchy((0, 0.25, 1))) == "Hierarchy(0, 0.25, 1)"
    assert Hierarchy((0, 1)).has_identity
    assert not Hierarchy((0.5, 1)).has_identity
