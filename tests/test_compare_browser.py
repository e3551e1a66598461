"""The page of a comparison in a browser: choosing and reading, by mouse and keys."""

import pytest
from browsing import DEPTH, TRAINING, names, reading, values
from comparisons import four_variants
from handmade_runs import document, make_run

from lit_resnorm.compare.page import write_page

pytestmark = [pytest.mark.browser, pytest.mark.usefixtures("quiet")]


def test_it_says_first_which_run_is_pathological_and_why(reader, folder):
    reader.open(folder / "four.html")
    assert reader.texts("main h2")[0] == "What was found"
    assert "3 of 4 runs are in trouble" in reader.texts(".lead")[0]
    cards = reader.texts("#findings .card")
    assert "LitVanillaNet" in cards[0]
    assert "The signal collapses with depth" in cards[0]
    assert "diverged" in cards[1]
    assert "LitResNetBN" in cards[3]
    assert "history.jsonl, line 3" in reader.texts(".skipped")[0]


def test_findings_unfold_and_what_is_constant_is_named_and_not_drawn(
    reader, folder, tmp_path
):
    rows = [{"step": step, "fim/rate": 0.05, "loss": 1.0 - step / 9} for step in (0, 5)]
    rows[0] |= {"fim/rate_ratio": 0.5, "moments/pathology": 1.0}
    rows[1] |= {"fim/rate_ratio": 0.25, "moments/pathology": 1.0}
    made = document(make_run(tmp_path / "a", rows))
    write_page(made, folder / "one.html")
    reader.open(folder / "one.html")
    (constants,) = reader.texts("#training .constant")
    assert constants == (
        "The same throughout each run: largest learning rate 0.05; pathology signal."
    )
    drawn = (
        "return [...document.querySelectorAll('#training select')].map(s => s.value)"
    )
    assert reader.run(drawn) == ["loss", "fim/rate_ratio"]
    assert not reader.find(".bad .explained p").is_displayed()
    reader.find(".bad .explained summary").click()
    paragraphs = reader.texts(".bad > span .explained p")
    assert paragraphs == [
        made["explanations"]["signal"]["meaning"],
        f"What to do: {made['explanations']['signal']['advice']}",
    ]
    assert reader.find(".bad .explained p").is_displayed()


def test_runs_and_quantities_are_chosen_by_mouse(reader, folder):
    reader.open(folder / "four.html")
    assert names(reader) == ["litvanillanet", "litresnetbn", "litbnfeedforward"]
    reader.find("#picker .items label").click()
    assert names(reader) == ["litresnetbn", "litbnfeedforward"]
    reader.find("#picker .items label", 3).click()
    assert names(reader) == ["litresnetbn"]
    reader.find("#picker .items label", 3).click()
    reader.find(f"{TRAINING} select").click()
    reader.find(f"{TRAINING} option[value='fim/lambda_max']").click()
    assert names(reader) == ["litresnet", "litresnetbn"]
    assert "training=fim/lambda_max~linear~auto" in reader.choices


def test_runs_and_quantities_are_chosen_by_keyboard(reader, folder):
    reader.open(folder / "four.html")
    for _ in range(40):
        reader.press("\ue004")  # Tab
        if reader.run("return document.activeElement.closest('.items') !== null"):
            break
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert reader.run(outline) != "none"
    reader.press("\ue00d")  # Space
    assert "litvanillanet" not in names(reader)
    for _ in range(10):
        reader.press("\ue004")
        if reader.run("return document.activeElement.tagName") == "SELECT":
            break
    before = names(reader)
    reader.press("\ue013")  # Up
    reader.press("f", "i", "m")
    reader.wait("document.querySelector('#training select').value.startsWith('fim')")
    assert names(reader) != before
    assert "training=fim/lambda_max" in reader.choices


def test_choices_are_kept_in_the_address(reader, folder):
    reader.open(folder / "four.html")
    reader.find("#picker .items label", 2).click()
    reader.find("#training .panel:nth-child(2) input", 1).click()
    reader.find("#training .remove").click()
    reader.find(f"{DEPTH} .check input").click()
    choices, drawn = reader.choices, names(reader)
    assert "~log" in choices
    reader.open(folder / "four.html", reader.run("return location.hash"))
    assert names(reader) == drawn
    reader.find("#picker .items label", 2).click()
    reader.find("#picker .items label", 2).click()
    assert reader.choices == choices


def test_an_address_that_makes_no_sense_is_left_aside(reader, folder):
    nonsense = "#runs=99.x.0&training=nothing~a~b&step=many&sort=~&several=1&show=x"
    reader.open(folder / "four.html", nonsense)
    assert names(reader, "#depth .panel") != []


def test_arrow_keys_read_the_exact_values_of_a_chart(reader, folder):
    reader.open(folder / "four.html")
    curve = four_variants()["series"]["val/loss"][1]
    reader.run(
        "arguments[0].focus({preventScroll: true})", reader.find(f"{TRAINING} .plot")
    )
    reader.press("\ue011", "\ue014", "\ue014")  # Home, Right, Right
    assert reading(reader) == "step 40"
    expected = curve["value"][curve["step"].index(40)]
    assert float(values(reader)["litresnetbn"]) == pytest.approx(expected, rel=1e-4)
    assert "step 40" in reader.texts("#spoken")[0]
    reader.press("\ue012")  # Left
    assert reading(reader) == "step 20"
    reader.press("\ue015", "\ue015")  # Down, Down
    assert reader.texts(f"{TRAINING} [aria-pressed=true]") == ["litresnetbn"]
    reader.press("\ue00c")  # Escape
    assert reading(reader) == "last value, step 420"


def test_the_pointer_reads_the_nearest_step(reader, folder):
    from selenium.webdriver import ActionChains

    reader.open(folder / "four.html")
    plot = reader.find(f"{TRAINING} .plot")
    # pixels at which the axis starts and ends: its line, from the plot's left edge
    axis = reader.run(
        "return arguments[0].querySelector('.axis').getAttribute('d')", plot
    )
    start, _, end = (float(word.strip("M")) for word in axis.replace("H", " ").split())
    for share in (0.3, 0.36, 0.92):
        across = round(start + share * (end - start) - plot.rect["width"] / 2)
        moves = ActionChains(reader.driver)
        moves.move_to_element_with_offset(plot, across, 0).perform()
        assert reading(reader) == f"step {20 * round(share * 21)}"
    assert reader.run("return document.querySelectorAll('.cursor circle').length") == 3


def test_the_table_of_a_chart_holds_its_values(reader, folder):
    reader.open(folder / "four.html")
    reader.find(f"{TRAINING} [aria-expanded]").click()
    rows = reader.texts(f"{TRAINING} tbody tr")
    assert len(rows) == len(four_variants()["series"]["val/loss"][0]["step"])
    assert rows[0].startswith("step 0")
    reader.find(f"{DEPTH} [aria-expanded]").click()
    assert "000.net.blocks.0.act" in reader.texts(f"{DEPTH} tbody tr")[0]


def test_results_are_sorted_by_mouse_and_by_keyboard(reader, folder):
    reader.open(folder / "four.html")
    assert reader.texts(".results .best") == [
        "\u2605 best: 0.9812",
        "\u2605 best: 0.0713",
        "\u2605 best: 14.2",
    ]
    head = reader.find(".results thead th:nth-child(4) button")
    head.click()
    first = reader.texts(".results tbody th")
    # the run without an accuracy is last, whichever way
    assert [first[0], first[3]] == ["litresnetbn", "litresnet diverged"]
    assert reader.run("return document.activeElement.closest('th').ariaSort") == (
        "descending"
    )
    head.send_keys("\ue007")  # Enter
    last = reader.texts(".results tbody th")
    assert [last[0], last[3]] == ["litvanillanet", "litresnet diverged"]
    assert "sort=test/acc~up" in reader.choices


def test_the_slider_of_steps_moves_the_curves_by_depth(reader, folder):
    reader.open(folder / "four.html")
    assert reader.texts("#depth .slider b") == ["0 (initialisation)"]
    at_the_start = values(reader, DEPTH)
    slider = reader.find("#depth input[type=range]")
    slider.send_keys("\ue010")  # End
    assert "step=420" in reader.choices
    assert values(reader, DEPTH) != at_the_start
    slider.send_keys("\ue011")  # Home
    assert values(reader, DEPTH) == at_the_start
    reader.find("#depth .check input").click()
    assert "litvanillanet, step 420" in names(reader, DEPTH)


def test_the_largest_eigenvalues_make_a_spectrum(reader, folder):
    reader.open(folder / "four.html")
    panel = "#spectra .panel"
    assert names(reader, panel) == ["litvanillanet", "litresnetbn"]
    reader.find(f"{panel} [aria-expanded]").click()
    ranks = reader.texts(f"{panel} tbody tr")
    assert len(ranks) == 10
    assert ranks[1] == "rank 2" + 2 * "45"


def test_groups_show_mean_spread_and_count_and_unfold(reader, folder):
    reader.open(folder / "few.html")
    assert set(names(reader)) == {"Variant0, depth 10", "Variant1, depth 10"}
    assert all(value.endswith("(3)") for value in values(reader).values())
    assert reader.run("return document.querySelectorAll('.band').length") == 8
    cells = reader.texts(".results tr.group td")
    assert cells[:3] == ["Variant0", "0.1", "0.501 \u00b1 0.001 (3)"]
    assert cells[3:] == ["Variant1", "0.1", "\u2605 best: 0.541 \u00b1 0.001 (3)"]
    assert len(reader.texts(".results tr.inner")) == 6
    reader.find(".fold").click()
    assert len(reader.texts(".results tr.inner")) == 3
    reader.find("#picker input[value=runs]").click()
    assert names(reader)[0] == "v0-0"
