"""Figures of what runs measured."""

import pytest

from lit_resnorm.figures import growth


def depth_axes(depths):
    figure = growth({0: [(depth, 1.5**depth) for depth in depths]}, quantity="chi")
    figure.draw_without_rendering()
    return [axes.xaxis for axes in figure.axes]


def labels(depths):
    axis, _ = depth_axes(depths)
    assert not any(label.get_text() for label in axis.get_minorticklabels())
    return [label.get_text() for label in axis.get_majorticklabels()]


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        (range(1, 3), "1 2"),
        (range(1, 7), "1 2 3 5"),
        (range(1, 51), "1 2 3 5 10 20 30 50"),
        (range(1, 201), "1 2 3 5 10 20 30 50 100 200"),
        (range(40, 51), "40 45 50"),
    ],
)
def test_growth_labels_its_log_axis_by_whole_depths(depths, expected):
    assert labels(depths) == expected.split()


@pytest.mark.parametrize("num", [2, 3, 6, 50])
def test_growth_labels_its_linear_axis_by_whole_depths(num):
    _, axis = depth_axes(range(1, num + 1))
    assert all(place == int(place) for place in axis.get_majorticklocs())
