"""Figures of what runs measured."""

import pytest

from lit_resnorm.figures import by_depth, captioned, growth, spectrum


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


def legend_of(axes):
    legend = axes.get_legend()
    return legend.get_title().get_text(), [t.get_text() for t in legend.get_texts()]


@pytest.mark.parametrize("draw", ["depth", "spectrum", "growth"])
def test_the_steps_of_a_figure_are_told_apart_eight_at_most(draw):
    def drawn(number):
        steps = range(0, 10 * number, 10)
        if draw == "growth":
            curves = {step: [(1, 1.0), (2, 2.0)] for step in steps}
            return growth(curves, quantity="chi").axes[-1]
        values = {step: [2.0, 1.0] for step in steps}
        if draw == "depth":
            return by_depth(["001.a", "002.b"], values, quantity="chi").axes[0]
        return spectrum(values, quantity="eigenvalue").axes[0]

    assert legend_of(drawn(1)) == ("optimizer step", ["0"])
    assert legend_of(drawn(3)) == ("optimizer step", ["0", "10", "20"])
    title, labels = legend_of(drawn(100))
    assert title == "optimizer step (8 of 100)"
    assert len(labels) == 8
    assert (labels[0], labels[-1]) == ("0", "990")


def test_by_depth_counts_the_sites_and_names_the_first_and_the_last():
    sites = [f"{place:03d}.net.{place}.add" for place in range(5, 17)]
    figure = by_depth(
        sites, {0: [1.0] * 12}, quantity="chi", across="residual addition"
    )
    (axes,) = figure.axes
    assert axes.lines[0].get_xdata().tolist() == [*range(1, 13)]
    label = axes.get_xlabel()
    assert label.startswith("residual addition, in the order of execution")
    assert "1: 005.net.5.add, 12: 016.net.16.add" in label
    figure.draw_without_rendering()
    assert all(place == int(place) for place in axes.get_xticks())


def test_a_caption_says_whose_a_figure_is():
    one = by_depth(["001.a"], {0: [1.0]}, quantity="chi", title="chi (moments/chi)")
    two = growth({0: [(1, 1.0), (2, 2.0)]}, quantity="chi", title="growth")
    for figure in (one, two):
        captioned(figure, "LitMLP, runs/a")
    assert one.axes[0].get_title() == "chi (moments/chi)\nLitMLP, runs/a"
    assert two.get_suptitle() == "growth\nLitMLP, runs/a"
