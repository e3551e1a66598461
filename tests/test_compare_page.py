"""The page of a comparison: self-contained and safe."""

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser
from importlib import resources

import pytest
from comparisons import four_variants, hostile
from many_runs import many_seeds

from lit_resnorm.compare.page import page_text, write_page
from lit_resnorm.compare.page.writing import SCRIPTS

FILES = resources.files("lit_resnorm.compare.page")


class Page(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.handlers = [], [], []
        self.scripts, self.styles, self.policy, self.title = [], [], {}, ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.handlers += [name for name in attributes if name.startswith("on")]
        self.addresses += [v for k, v in attrs if k in ("src", "href", "action")]
        if tag == "script":
            self.scripts.append([attributes, ""])
        if attributes.get("http-equiv") == "Content-Security-Policy":
            rules = [rule.split() for rule in attributes["content"].split(";")]
            self.policy = {name: values for name, *values in rules}

    def handle_data(self, data):
        if self.tags[-1:] == ["script"]:
            self.scripts[-1][1] += data
        if self.tags[-1:] == ["style"]:
            self.styles.append(data)
        if self.tags[-1:] == ["title"]:
            self.title += data

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    @property
    def document(self):
        attributes, text = self.scripts[0]
        if attributes["data-encoding"] == "deflate":
            text = zlib.decompress(base64.b64decode(text))
        return json.loads(text)


def quoted_hash(text):
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def test_the_document_comes_back_out_of_the_page(tmp_path):
    path = tmp_path / "pages" / "compare.html"
    document = four_variants()
    write_page(document, path)
    read = Page(path.read_text(encoding="utf-8")).document
    for key in set(document) - {"series", "depth"}:
        assert read[key] == document[key]
    for key, curves in document["series"].items():
        for written, curve in zip(read["series"][key], curves, strict=True):
            assert written["step"] == curve["step"]
            for one, other in zip(written["value"], curve["value"], strict=True):
                # nine digits, more than a float32 has
                assert one == other or one == pytest.approx(other, rel=1e-8)


def test_numbers_that_are_not_finite_are_words_in_the_page():
    values = [1.0, float("nan"), float("inf"), -float("inf"), None]
    document = {"series": {"loss": [{"run": 0, "step": [*range(5)], "value": values}]}}
    (curve,) = Page(page_text(document)).document["series"]["loss"]
    assert curve["value"] == [1.0, "NaN", "Infinity", "-Infinity", None]


def test_a_large_document_is_deflated_and_comes_back():
    document = many_seeds(seeds=4, points=400, quantities=5)
    page = Page(page_text(document))
    assert page.scripts[0][0]["data-encoding"] == "deflate"
    assert page.document["runs"] == document["runs"]


def test_names_and_values_of_runs_are_text_and_nothing_else():
    document = hostile()
    page = Page(page_text(document))
    assert page.document["runs"] == document["runs"]
    assert page.document["findings"] == document["findings"]
    assert page.title == document["title"]
    plain = Page(page_text(four_variants()))
    count = len(four_variants()["findings"])
    assert page.tags.count("script") == plain.tags.count("script") == 2
    assert page.tags.count("li") == plain.tags.count("li") == count
    assert "img" not in page.tags
    assert page.handlers == []
    assert "\u2028" not in page.scripts[0][1]


def test_the_page_refers_to_nothing_outside_itself():
    text = page_text(four_variants())
    assert set(re.findall(r"\w+://[^\"'\s<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert Page(text).addresses == ["data:,"]
    for call in ("@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "import("):
        assert call not in text


def test_the_policy_allows_the_pages_own_script_and_style_alone():
    page = Page(page_text(four_variants()))
    assert page.policy == {
        "default-src": ["'none'"],
        "script-src": [quoted_hash(page.scripts[1][1])],
        "style-src": [quoted_hash("".join(page.styles))],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }


def test_no_script_makes_markup_of_text():
    for name in SCRIPTS:
        text = FILES.joinpath(name).read_text("utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write", text
        )


def test_every_script_of_the_package_is_on_the_page():
    there = {path.name for path in FILES.iterdir() if path.name.endswith(".js")}
    assert set(SCRIPTS) == there
    assert len(SCRIPTS) == len(there)


def luminance(colour):
    shares = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [
        s / 12.92 if s <= 0.03928 else ((s + 0.055) / 1.055) ** 2.4 for s in shares
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_their_ground(scheme):
    style = FILES.joinpath("page.css").read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    block = blocks[0] if scheme == "light" else blocks[1]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for ground in (colours["paper"], colours["ground"]):
        # WCAG 2.2: 4.5 for text (1.4.3), 3 for what a graph is made of (1.4.11)
        for name in ("ink", "soft", "accent"):
            assert contrast(colours[name], ground) >= 4.5
        for name in ("c0", "c1", "c2", "c3", "c4", "c5", "edge"):
            assert contrast(colours[name], ground) >= 3
    for name in ("bad", "warn", "good", "info"):
        assert contrast(colours[name], colours[f"{name}-ground"]) >= 4.5
