"""The page of a comparison in a browser: any names, any sizes, any window."""

import pytest
from browsing import TRAINING, names
from comparisons import hostile

from lit_resnorm.compare.page import write_page

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("quiet")]


def test_the_watch_sees_a_request_and_a_complaint(reader, folder):
    address = "http://127.0.0.1:9/picture.png"
    bad = folder / "bad.html"
    bad.write_text(f"<img src='{address}'><script>nothing.at.all</script>")
    reader.driver.get(bad.as_uri())
    reader.wait("document.images[0].complete")
    assert address in reader.requests()
    assert any("nothing is not defined" in one for one in reader.complaints())


def test_a_hundred_runs_can_all_be_drawn(reader, folder):
    reader.open(folder / "seeds.html", "#show=runs")
    assert len(names(reader)) == 10
    reader.find("#picker .buttons button").click()
    assert len(names(reader)) == 100
    reader.find("#picker input[type=search]").send_keys("v9-")
    assert len(reader.texts("#picker .items label")) == 10
    reader.find("#picker .buttons button", 1).click()
    assert len(names(reader)) == 90


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", ["four", "hostile", "seeds"])
@pytest.mark.parametrize("width", [1400, 400])
def test_no_page_is_wider_than_its_window(reader, folder, page, width, scheme):
    reader.look(width, scheme=scheme)
    reader.open(folder / f"{page}.html")
    reader.find(f"{TRAINING} [aria-expanded]").click()
    assert reader.run("return document.documentElement.scrollWidth") <= width
    ground = reader.run("return getComputedStyle(document.body).backgroundColor")
    darkness = sum(map(int, ground.removeprefix("rgb(").rstrip(")").split(",")))
    assert (darkness < 200) == (scheme == "dark")


def test_names_that_hold_markup_are_shown_and_do_nothing(reader, folder):
    reader.open(folder / "hostile.html")
    shown = reader.texts("#picker .items .name")
    assert shown[0] == hostile()["runs"][0]["name"]
    reader.find("#training .add").click()
    for button in range(len(reader.texts("[aria-expanded]"))):
        reader.find("[aria-expanded]", button).click()
    assert reader.run("return typeof window.hurt") == "undefined"
    assert reader.run("return document.scripts.length") == 2
    assert reader.run("return document.images.length") == 0


@pytest.mark.parametrize("document", [{}, {"runs": [{"name": "a"}]}])
def test_a_document_with_gaps_is_shown_as_far_as_it_goes(reader, folder, document):
    write_page(document, folder / "gaps.html")
    reader.open(folder / "gaps.html")
    assert reader.run("return document.getElementById('trouble').hidden")


@pytest.mark.parametrize("axis", ["linear", "log"])
def test_values_of_any_size_are_drawn(reader, folder, axis):
    values = {
        "huge": [1.7e308, -1.7e308, 1e300],
        "tiny": [5e-324, 1e-310, 2e-308],
        "close": [1e16, 1e16 + 2, 1e16 + 4],
        "constant": [0.0, 0.0, 0.0],
        "negative": [-1.0, -2.0, -3.0],
        "nothing": ["NaN", "NaN", None],
    }
    series = {
        key: [{"run": 0, "step": [0, 1, 2], "value": value}]
        for key, value in values.items()
    }
    write_page({"runs": [{"name": "a"}], "series": series}, folder / "sizes.html")
    charts = "&".join(f"training={key}~{axis}~{axis}" for key in values)
    reader.open(folder / "sizes.html", f"#{charts}")
    drawn = reader.run(
        "return [...document.querySelectorAll('.plot')]"
        ".map((plot) => plot.querySelectorAll('.lines .mark').length)"
    )
    expected = [3, 3, 3, 3, 3, 0] if axis == "linear" else [2, 3, 3, 0, 0, 0]
    assert drawn == expected


def test_everything_that_can_be_used_has_a_name(reader, folder):
    reader.open(folder / "four.html")
    nodes = reader.command("Accessibility.getFullAXTree")["nodes"]
    used = {"button", "checkbox", "combobox", "slider", "searchbox", "application"}
    named = [
        (node["role"]["value"], node["name"]["value"].strip())
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in used
    ]
    assert {role for role, _ in named} == used
    assert [role for role, name in named if not name] == []


def test_nothing_moves_for_those_who_ask_for_that(reader, folder):
    seconds = (
        "return getComputedStyle(document.querySelector('.lines g')).transitionDuration"
    )
    reader.open(folder / "four.html")
    assert reader.run(seconds) == "0.12s"
    reader.look(motion="reduce")
    assert reader.run(seconds) == "0s"


def test_a_browser_that_cannot_unpack_the_data_says_so(reader, folder):
    script = reader.command(
        "Page.addScriptToEvaluateOnNewDocument",
        source="delete window.DecompressionStream",
    )
    try:
        reader.driver.get((folder / "seeds.html").as_uri())
        reader.wait("!document.getElementById('trouble').hidden")
        assert "DecompressionStream" not in reader.texts("#trouble")[0]
        assert "too old" in reader.texts("#trouble")[0]
        (complaint,) = reader.complaints()
        assert "too old" in complaint
    finally:
        reader.command("Page.removeScriptToEvaluateOnNewDocument", **script)
