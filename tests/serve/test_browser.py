"""The page in headless Chromium: load a document, ask, watch the answer come, see the slots."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import WORDS
from servers import Running, running

from lococo.session import Session

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright, which drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, in which the page would be opened")

FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
TEXT = WORDS * 20
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "is_mobile": True}


class Seen:
    """A page and all that its console and its network said.

    Args:
        page: Of playwright.
        url: Of the server.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.faults: list[str] = []
        self.foreign: list[str] = []
        page.on("console", lambda said: self.faults.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.faults.append(str(error)))
        page.on("request", lambda asked: None if asked.url.startswith(url) else self.foreign.append(asked.url))
        page.goto(url)
        self.until("document.querySelector('#model').textContent.includes('slots')")

    def until(self, true: str) -> None:
        """Wait for an expression; playwright's own way to do so needs `eval`, which the page's policy forbids."""
        end = time.monotonic() + 20
        while not self.page.evaluate(true):
            assert time.monotonic() < end, true
            self.page.wait_for_timeout(10)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def tab_to(self, name: str) -> None:
        """Press Tab until an element has the focus, as a person without a mouse would."""
        for _ in range(20):
            self.press("Tab")
            if self.page.evaluate("document.activeElement.id") == name:
                return
        pytest.fail(f"Tab does not lead to #{name}")

    def until_read(self) -> None:
        self.until("document.querySelector('#context').value.startsWith('ctx_')")
        self.until("document.activeElement.id === 'question'")

    def until_answered(self) -> None:
        self.until("!document.querySelector('#ask').disabled")


@pytest.fixture(scope="module")
def talkative(attached: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(attached, tmp_path_factory.mktemp("contexts"), max_new_tokens=100) as one:
        yield one


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        # The profile is a new temporary folder every time. Chromium's sandbox does not start for root.
        one = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, chromium_sandbox=False)
        yield one
        one.close()


@pytest.fixture
def open_page(browser: Any, talkative: Running) -> Iterator[Any]:
    opened = []

    def open_one(**how: Any) -> Seen:
        opened.append(browser.new_context(**how))
        return Seen(opened[-1].new_page(), talkative.url)

    yield open_one
    for one in opened:
        one.close()


def test_the_main_path_needs_no_mouse(open_page: Any, talkative: Running) -> None:
    seen = open_page()
    page = seen.page
    seen.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("getComputedStyle(document.activeElement).left") == "16px"  # it has come into sight
    seen.tab_to("text")
    page.keyboard.insert_text(TEXT)
    seen.tab_to("read")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    seen.press("Enter")
    seen.until_read()
    tokens = talkative.state.store.all_of("local")[0].tokens
    assert f"{tokens:,} tokens read" in page.text_content("#reading")
    # Every change of the answer is noted as it is drawn.
    page.evaluate(
        "window.lengths = []; new MutationObserver(() => lengths.push(answers.lastChild?.textContent.length))"
        ".observe(document.querySelector('#answers'), {childList: true, subtree: true, characterData: true})"
    )
    page.keyboard.insert_text("Who jumps?")
    seen.press("Control+Enter")
    seen.until("document.querySelector('#answers .answered')?.textContent")
    seen.until_answered()
    lengths = page.evaluate("lengths")
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 20  # it came in pieces
    assert page.text_content("#answers .asked") == "Who jumps?"
    assert page.evaluate("document.activeElement.id") == "question"
    assert page.text_content("#slots") == "32"
    assert re.fullmatch(r"12 KiB, where a full cache would hold .+", page.text_content("#memory"))
    assert float(page.text_content("#speed").replace(",", "")) > 0
    seen.tab_to("anew")
    seen.press("Space")
    assert page.text_content("#answers") == ""
    assert (seen.faults, seen.foreign) == ([], [])


def test_the_heat_map_shows_what_the_server_says(open_page: Any, talkative: Running, tmp_path: Path) -> None:
    seen = open_page()
    page = seen.page
    path = tmp_path / "foxes.md"
    path.write_text(TEXT, "utf-8")
    page.set_input_files("#file", path)
    page.click("#read")
    seen.until_read()
    assert page.text_content("#context option:checked").startswith("foxes.md (")
    with talkative.client() as client:
        place = f"/v1/contexts/{page.input_value('#context')}/slots"
        layers = client.get(place, params={"bins": 100}).json()["layers"]
    shares = [share for layer in layers for share in layer["shares"]]
    drawn = page.evaluate(
        "[...map.getContext('2d').getImageData(0, 0, map.width, map.height).data].filter((_, i) => i % 4 == 3)"
    )
    assert len(drawn) == len(shares) == 2 * 100
    assert max(drawn) == 255
    assert [opacity / 255 for opacity in drawn] == pytest.approx([one / max(shares) for one in shares], abs=0.02)
    page.click("#forget")
    seen.until("document.querySelector('#map').getAttribute('aria-label') === 'No document is chosen'")
    assert (seen.faults, seen.foreign) == ([], [])


def test_a_phone_needs_no_scrolling_to_the_side(open_page: Any) -> None:
    seen = open_page(**PHONE)
    page = seen.page
    page.fill("#text", "a" * 500 + " " + TEXT)
    page.tap("#read")
    seen.until_read()
    page.fill("#question", "o" * 200 + "?")
    page.tap("#ask")
    seen.until_answered()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for name in ("read", "ask", "stop", "anew", "forget"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["height"] >= 44  # a fingertip
        assert box["x"] + box["width"] <= 360
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('#question')).fontSize)") >= 16
    assert seen.faults == []


def test_an_error_is_told_and_the_question_stays(open_page: Any, talkative: Running) -> None:
    seen = open_page()
    page = seen.page
    page.click("#read")
    assert page.text_content("#reading") == "Choose a file or write a text first."
    page.fill("#text", "  one two")
    page.click("#read")
    seen.until_read()
    with talkative.client() as client:
        assert client.delete(f"/v1/contexts/{page.input_value('#context')}").status_code == 200
    page.fill("#question", "Who?")
    page.click("#ask")
    seen.until_answered()
    assert "no such context" in page.text_content("#state")
    assert page.locator("#answers .answered").count() == 0
    assert page.input_value("#question") == "Who?"


@pytest.mark.parametrize(("scheme", "size"), [("light", "desk"), ("dark", "phone")])
def test_axe_finds_nothing(scheme: str, size: str, open_page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe, which looks for barriers")
    seen = open_page(color_scheme=scheme, **(PHONE if size == "phone" else {}))
    page = seen.page
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 3 * 64) is (scheme == "dark")
    page.fill("#text", TEXT)
    page.click("#read")
    seen.until_read()
    page.fill("#question", "Who?")
    page.click("#ask")
    seen.until_answered()
    page.evaluate("document.querySelector('#key-box').hidden = false")  # what servers with keys show
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == []
    page.goto(page.url + "docs")
    found = axe.Axe().run(page).response["violations"]
    assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == []
