"""The page of a comparison in a browser: by mouse, by keyboard, by small screens."""

import pytest
from browsing import Reader
from comparisons import four_variants, hostile, many_seeds

from lit_resnorm.compare.page import write_page

pytestmark = pytest.mark.browser

TRAINING = "#training .panel:first-child"
DEPTH = "#depth .panel:first-child"


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("profile"))
    yield reader
    reader.driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_page(four_variants(), folder / "four.html")
    write_page(hostile(), folder / "hostile.html")
    seeds = many_seeds(seeds=10, points=300, quantities=3)
    write_page(seeds, folder / "seeds.html")
    write_page(many_seeds(variants=2, seeds=3, points=30), folder / "few.html")
    return folder


@pytest.fixture(autouse=True)
def quiet(reader, folder):
    """No test leaves an error in the console, or asks for anything but its page."""
    reader.look()
    reader.complaints(), reader.requests()
    yield
    assert reader.complaints() == []
    start = (folder.as_uri(), "data:", "about:", "blob:null")
    assert [url for url in reader.requests() if not url.startswith(start)] == []


def names(reader, panel=TRAINING):
    return reader.texts(f"{panel} .legend .name")


def values(reader, panel=TRAINING):
    return dict(zip(names(reader, panel), reader.texts(f"{panel} .value"), strict=True))


def reading(reader, panel=TRAINING):
    return reader.texts(f"{panel} .readout-at")[0]


def test_the_watch_sees_a_request_and_a_complaint(reader, folder):
    address = "http://127.0.0.1:9/picture.png"
    bad = folder / "bad.html"
    bad.write_text(f"<img src='{address}'><script>nothing.at.all</script>")
    reader.driver.get(bad.as_uri())
    reader.wait("document.images[0].complete")
    assert address in reader.requests()
    assert any("nothing is not defined" in one for one in reader.complaints())


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


def test_runs_and_quantities_are_chosen_by_mouse(reader, folder):
    reader.open(folder / "four.html")
    assert names(reader) == ["litvanillanet", "litresnetbn", "litbnfeedforward"]
    reader.find("#picker .items label").click()
    assert names(reader) == ["litresnetbn", "litbnfeedforward"]
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
    reader.press("\ue015", "\ue015")  # Down, Down
    assert reader.texts(f"{TRAINING} [aria-pressed=true]") == ["litresnetbn"]
    reader.press("\ue00c")  # Escape
    assert reading(reader) == "last value, step 420"


def test_the_pointer_reads_the_nearest_step(reader, folder):
    from selenium.webdriver import ActionChains

    reader.open(folder / "four.html")
    plot = reader.find(f"{TRAINING} .plot")
    ActionChains(reader.driver).move_to_element(plot).perform()
    step = int(reading(reader).removeprefix("step "))
    assert step in range(160, 280, 20)
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
    assert reader.texts("#depth output") == ["0 (initialisation)"]
    at_the_start = values(reader, DEPTH)
    slider = reader.find("#depth input[type=range]")
    slider.send_keys("\ue010")  # End
    assert "step=420" in reader.choices
    assert values(reader, DEPTH) != at_the_start
    slider.send_keys("\ue011")  # Home
    assert values(reader, DEPTH) == at_the_start
    reader.find("#depth .check input").click()
    assert "litvanillanet, step 420" in names(reader, DEPTH)


def test_groups_show_mean_spread_and_count_and_unfold(reader, folder):
    reader.open(folder / "few.html")
    assert set(names(reader)) == {"Variant0, depth 10", "Variant1, depth 10"}
    assert all(value.endswith("(3)") for value in values(reader).values())
    assert reader.run("return document.querySelectorAll('.band').length") == 8
    assert len(reader.texts(".results tr.inner")) == 6
    reader.find(".fold").click()
    assert len(reader.texts(".results tr.inner")) == 3
    reader.find("#picker input[value=runs]").click()
    assert names(reader)[0] == "v0-0"


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


def test_everything_that_can_be_used_has_a_name(reader, folder):
    reader.open(folder / "few.html")
    nameless = reader.run(
        "return [...document.querySelectorAll('button, input, select, [tabindex]')]"
        ".filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length))"
        ".map((e) => e.outerHTML)"
    )
    assert nameless == []


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
