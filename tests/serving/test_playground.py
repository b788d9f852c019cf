"""The playground page in Chromium, with a fake server and with the real one."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from played_server import LONGEST_PROMPT, OWN_NAMES, TEXT, Piece, Played, PlayedServer, piece
from scipy.stats import binomtest

from pipeline.decoding import SamplingParams

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed", allow_module_level=True)

from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright  # noqa: E402

if TYPE_CHECKING:
    from served_model import Running

ALWAYS_SENT = {"prompt": "The", "stream": True, "stream_options": {"include_usage": True}, "logprobs": 5}
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[PlayedServer]:
    with PlayedServer() as server:
        yield server


@pytest.fixture
def played(server: PlayedServer) -> Iterator[Played]:
    server.played = Played()
    yield server.played
    server.played.go_on.set()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-GB")
    yield context
    context.close()


@pytest.fixture
def faults() -> list[str]:
    """The errors of the browser; every test must end without any, except requests that the server refused."""
    return []


@pytest.fixture
def page(context: BrowserContext, server: PlayedServer, played: Played, faults: list[str]) -> Iterator[Page]:
    """The page, not opened yet, so that a test can set the server's answers first."""
    page = context.new_page()
    page.set_default_timeout(5000)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.add_init_script(
        "addEventListener('securitypolicyviolation', (event) => console.error(`policy: ${event.violatedDirective}`))"
    )
    yield page
    assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []


@pytest.fixture(scope="module")
def running(tiny_engine_folder: Path) -> "Iterator[Running]":
    """The real server, with a model of random weights."""
    served_model = pytest.importorskip("served_model", reason="there is no server yet")
    with served_model.running_server(tiny_engine_folder) as running:
        yield running


def open_page(page: Page, server: "PlayedServer | Running") -> Page:
    page.goto(server.url)
    expect(page.get_by_role("list", name="The model").get_by_role("listitem")).not_to_have_count(0)
    page.get_by_label("Prompt", exact=True).fill("The")
    return page


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_hidden()


def tokens(page: Page, side: str = "A") -> Locator:
    return page.get_by_role("group", name=f"Tokens of answer {side}")


def field(page: Page, name: str, side: str = "A") -> Locator:
    return page.locator(f"#{name}-{side}")


def decoding_of(body: dict[str, Any]) -> dict[str, Any]:
    assert {name: body[name] for name in ALWAYS_SENT} == ALWAYS_SENT
    return {name: value for name, value in body.items() if name not in ALWAYS_SENT}


def test_text_comes_as_it_is_made(page: Page, server: PlayedServer, played: Played) -> None:
    played.first_piece_only = True
    open_page(page, server).get_by_role("button", name="Generate").click()
    expect(tokens(page)).to_have_text(" keeper", use_inner_text=False)
    expect(page.get_by_role("status").last).to_have_text("Generating…")
    played.go_on.set()
    expect(page.get_by_role("status").last).to_have_text("8 tokens.")
    assert tokens(page).text_content() == TEXT
    expect(page.locator(".figures").first).to_contain_text("stop reached its end")
    expect(page.locator(".figures").first).to_contain_text("to the first")


def test_a_thumb_is_sent_changed_and_taken_back(page: Page, server: PlayedServer, played: Played) -> None:
    played.takes_feedback = True
    generate(open_page(page, server))
    thumbs = page.get_by_role("group", name="Feedback on answer A")
    good, bad = (thumbs.get_by_role("button", name=name) for name in ("Good answer", "Bad answer"))
    expect(good).to_have_attribute("aria-pressed", "false")
    good.focus()
    page.keyboard.press("Enter")
    expect(good).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(bad).to_have_attribute("aria-pressed", "true")
    expect(good).to_have_attribute("aria-pressed", "false")
    expect(page.get_by_role("status").last).to_have_text("Feedback kept.")
    bad.click()
    expect(bad).to_have_attribute("aria-pressed", "false")
    expect(page.get_by_role("status").last).to_have_text("Feedback taken back.")
    assert played.feedback == [{"id": "cmpl-1", "value": value} for value in (True, False, None)]

    played.forgets = True
    bad.click()
    expect(page.get_by_role("status").last).to_have_text("The feedback is not kept: id: no trace of such a completion")
    expect(bad).to_have_attribute("aria-pressed", "false")


def test_thumbs_belong_to_one_whole_answer(page: Page, server: PlayedServer, played: Played) -> None:
    played.takes_feedback = True
    open_page(page, server)
    page.get_by_label("Compare two settings").check()
    generate(page)
    for side in "BA":
        page.get_by_role("group", name=f"Feedback on answer {side}").get_by_role("button", name="Good answer").click()
        expect(page.get_by_role("button", name="Good answer", pressed=True)).to_have_count("BA".index(side) + 1)
    assert sorted(each["id"] for each in played.feedback) == ["cmpl-1", "cmpl-2"]

    # A new answer has none yet, and one that broke off is not judged.
    played.breaks = "the engine failed"
    generate(page)
    expect(page.get_by_role("button", name="Good answer")).to_have_count(0)
    played.breaks = None
    generate(page)
    expect(page.get_by_role("button", name="Good answer", pressed=False)).to_have_count(2)


def test_no_thumbs_without_traces(page: Page, server: PlayedServer) -> None:
    generate(open_page(page, server))
    expect(page.get_by_role("button", name="Copy", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Good answer")).to_have_count(0)


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stopping_reaches_the_server(way: str, page: Page, server: PlayedServer, played: Played) -> None:
    played.endless = True
    open_page(page, server).get_by_role("button", name="Generate").click()
    expect(tokens(page)).to_contain_text("lamp")
    if way == "button":
        page.get_by_role("button", name="Stop", exact=True).click()
    else:
        page.keyboard.press(way)
    assert played.disconnected.wait(5)
    expect(page.get_by_role("status").last).to_have_text("Stopped.")
    expect(page.locator(".figures").first).to_contain_text("stopped by you")
    assert tokens(page).text_content().startswith(TEXT[:12])
    played.endless = False
    generate(page)
    assert tokens(page).text_content() == TEXT


def test_what_is_not_touched_is_not_sent(page: Page, server: PlayedServer, played: Played) -> None:
    generate(open_page(page, server))
    assert decoding_of(played.bodies[0]) == {}


def test_what_is_touched_is_sent_until_it_is_reset(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    field(page, "temperature").fill("0.35")
    page.get_by_label("top_k of A, slider").focus()
    page.keyboard.press("ArrowRight")
    field(page, "max_tokens").fill("7")
    field(page, "stop").fill("\\n\\n\nThe end\\\\")
    # More than a double can hold.
    field(page, "seed").fill(str(2**63 - 1))
    generate(page)
    assert decoding_of(played.bodies[0]) == {
        "temperature": 0.35,
        "top_k": 51,
        "max_tokens": 7,
        "stop": ["\n\n", "The end\\"],
        "seed": 2**63 - 1,
    }
    assert f'"seed":{2**63 - 1}' in played.raw_bodies[0]

    page.get_by_role("button", name="Reset temperature of A to the model's own").click()
    expect(field(page, "temperature")).to_have_value("0.8")
    field(page, "stop").fill("")
    generate(page)
    assert decoding_of(played.bodies[1]) == {"top_k": 51, "max_tokens": 7, "seed": 2**63 - 1}

    page.get_by_role("button", name="Reset all").click()
    expect(field(page, "top_k")).to_have_value("50")
    generate(page)
    assert decoding_of(played.bodies[2]) == {}


def test_the_settings_are_those_of_the_engine(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    neutral = SamplingParams()
    shown = page.evaluate("PARAMETERS.map(({ name, neutral }) => [name, neutral])")
    known = {each.name for each in fields(SamplingParams)}
    for name, value in shown:
        own_name = OWN_NAMES.get(name, name)
        assert own_name in known
        own = getattr(neutral, own_name)
        assert value == (list(own) if isinstance(own, tuple) else own), name
    assert field(page, "temperature").input_value() == "0.8"
    assert field(page, "max_tokens").input_value() == "400"
    assert field(page, "top_p").input_value() == "1"
    expect(page.locator("#row-top_k")).to_contain_text("model's own: 50")


def test_a_preset_fills_the_controls_and_changes_override_it(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    field(page, "top_k").fill("7")
    field(page, "seed").fill("5")
    preset = page.get_by_label("preset of A")
    assert preset.locator("option").all_text_contents() == ["the model's own", "balanced", "faithful", "adventurous"]
    preset.select_option("faithful")
    shown = {"temperature": "0.5", "top_k": "0", "top_p": "0.9", "max_tokens": "300", "stop": "", "seed": "5"}
    assert {name: field(page, name).input_value() for name in shown} == shown
    expect(page.locator("#row-temperature")).to_contain_text("faithful: 0.5")
    # Parameters without a control are listed.
    also = page.locator("#row-preset .also").first
    expect(also).to_have_text("also repetition_detection [20,3]")
    generate(page)
    assert decoding_of(played.bodies[0]) == {"preset": "faithful", "seed": 5}

    field(page, "top_p").fill("0.8")
    generate(page)
    assert decoding_of(played.bodies[1]) == {"preset": "faithful", "top_p": 0.8, "seed": 5}
    page.get_by_role("button", name="Reset top_p of A to faithful").click()
    expect(field(page, "top_p")).to_have_value("0.9")

    preset.select_option("adventurous")
    expect(field(page, "stop")).to_have_value("\\n\\n")
    expect(field(page, "max_tokens")).to_have_value("")
    expect(also).to_be_hidden()
    preset.select_option("the model's own")
    expect(page.locator("#row-temperature")).to_contain_text("model's own: 0.8")
    assert {name: field(page, name).input_value() for name in ("temperature", "top_k", "max_tokens")} == {
        **{"temperature": "0.8", "top_k": "50", "max_tokens": "400"}
    }
    generate(page)
    assert decoding_of(played.bodies[2]) == {"seed": 5}


def test_two_presets_are_compared(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server).get_by_label("preset of A").select_option("faithful")
    page.get_by_label("Compare two settings").check()
    # B starts with the settings of A.
    expect(page.get_by_label("preset of B")).to_have_value("faithful")
    page.get_by_label("preset of B").select_option("adventurous")
    expect(page.locator("#row-temperature")).to_contain_text("faithful: 0.5 · adventurous: 1.2")
    differing = ["preset", "temperature", "top_p", "typical_p", "max_tokens", "stop"]
    assert page.locator(".row.differs label").all_text_contents() == differing
    field(page, "top_p", "B").fill("0.7")
    generate(page)
    one, other = sorted((decoding_of(body) for body in played.bodies), key=lambda body: body["preset"], reverse=True)
    assert one == {"preset": "faithful", "seed": one["seed"]}
    assert other == {"preset": "adventurous", "top_p": 0.7, "seed": one["seed"]}
    chips = page.locator(".answer").last.get_by_role("listitem").all_text_contents()
    assert chips[:3] == ["adventurous", "temperature 1.2", "top_p 0.7"]

    page.get_by_role("button", name="Reset all").click()
    for side in ("A", "B"):
        expect(page.get_by_label(f"preset of {side}")).to_have_value("")
        expect(field(page, "temperature", side)).to_have_value("0.8")
    generate(page)
    assert [decoding_of(body).keys() for body in played.bodies[2:]] == [{"seed"}, {"seed"}]


def test_a_preset_is_chosen_by_keyboard(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    preset = page.get_by_label("preset of A")
    expect(preset).to_have_accessible_description(re.compile("^Settings that come with the model"))
    preset.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(field(page, "temperature")).to_have_value("0.5")
    expect(preset).to_be_focused()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status").last).to_have_text("8 tokens.")
    assert decoding_of(played.bodies[0]) == {"preset": "faithful"}


def test_a_model_without_presets_has_none_to_choose(page: Page, server: PlayedServer, played: Played) -> None:
    played.presets = {}
    open_page(page, server)
    expect(page.locator("#preset-A")).to_be_hidden()
    page.get_by_label("Compare two settings").check()
    expect(page.locator("#preset-B")).to_be_hidden()
    generate(page)
    assert all(decoding_of(body).keys() == {"seed"} for body in played.bodies)


def test_a_preset_that_the_next_model_lacks_is_reported(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server).get_by_label("preset of A").select_option("balanced")
    played.version = "4"
    played.presets = {"balanced": {"temperature": 1.1}}
    generate(page)
    expect(field(page, "temperature")).to_have_value("1.1")
    played.presets = {"faithful": {"temperature": 0.3}}
    generate(page)
    message = "preset: 'balanced' is none of faithful"
    expect(page.locator(".answer").first.get_by_role("alert")).to_contain_text(message)
    expect(page.get_by_label("preset of A")).to_have_attribute("aria-invalid", "true")
    played.version = "5"
    page.evaluate("loadCard()")
    expect(page.get_by_text("It has no preset balanced, so its own decoding is set.")).to_be_visible()
    expect(page.get_by_label("preset of A")).to_have_value("")
    expect(page.get_by_label("preset of A")).not_to_have_attribute("aria-invalid", "true")
    expect(field(page, "temperature")).to_have_value("0.8")


def test_both_sides_share_a_seed_that_the_page_draws(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server).get_by_label("Compare two settings").check()
    field(page, "temperature", "A").fill("0.3")
    field(page, "temperature", "B").fill("1.3")
    field(page, "top_p", "B").fill("0.9")
    generate(page)
    one, other = sorted((decoding_of(body) for body in played.bodies), key=lambda body: body["temperature"])
    assert one == {"temperature": 0.3, "seed": one["seed"]}
    assert other == {"temperature": 1.3, "top_p": 0.9, "seed": one["seed"]}
    for side in ("A", "B"):
        assert tokens(page, side).text_content() == TEXT
    expect(page.locator(".figures").first).to_contain_text(f"seed {one['seed']}")

    differing = page.locator(".row.differs label").all_text_contents()
    assert differing == ["temperature", "top_p"]
    assert page.locator(".answer").first.get_by_role("listitem").all_text_contents() == ["temperature 0.3", "top_p 1"]

    generate(page)
    drawn = {body["seed"] for body in played.bodies[2:]}
    assert len(drawn) == 1
    assert drawn != {one["seed"]}

    page.get_by_role("button", name=f"Keep seed {drawn.pop()}").first.click()
    generate(page)
    assert [body["seed"] for body in played.bodies[4:]] == [body["seed"] for body in played.bodies[2:4]]
    expect(field(page, "seed")).to_have_value(str(played.bodies[2]["seed"]))


def compare_blind(page: Page, server: PlayedServer, played: Played) -> None:
    """Compare a temperature of 0.3 with one of 1.3, each of which has its own text."""
    played.pieces = lambda body: [piece(" cool" if body["temperature"] < 1 else " hot", -3.0)] * 2
    open_page(page, server).get_by_label("Compare two settings").check()
    page.get_by_label("Blind vote").check()
    field(page, "temperature", "A").fill("0.3")
    field(page, "temperature", "B").fill("1.3")


def show_first(page: Page, side: str) -> None:
    """Decide what the page draws at random."""
    page.evaluate("(value) => { crypto.getRandomValues = (array) => array.fill(value); }", int(side == "A"))


def cast(page: Page, choice: str) -> Locator:
    """Generate, vote, and return the tally."""
    generate(page)
    page.get_by_role("button", name=choice).click()
    return page.locator("#tally")


def kept_votes(page: Page) -> Any:
    return json.loads(page.evaluate("localStorage.getItem('playground-votes')") or "[]")


@pytest.mark.parametrize("first", ["A", "B"])
def test_a_blind_vote_hides_which_is_whose_until_it_is_cast(
    first: str, page: Page, server: PlayedServer, played: Played
) -> None:
    compare_blind(page, server, played)
    show_first(page, first)
    generate(page)
    answers = page.locator(".answer")
    texts = [" cool cool", " hot hot"] if first == "A" else [" hot hot", " cool cool"]
    for number, text in (("1", texts[0]), ("2", texts[1])):
        assert tokens(page, number).text_content() == text
        answer = answers.nth(int(number) - 1)
        expect(answer.locator(".badge")).to_have_text(number)
        assert answer.inner_text().split("\n")[0] == number
        assert "temperature" not in answer.inner_text()
        assert "tokens" not in answer.inner_text()
        token = tokens(page, number).locator(".token").first
        assert token.evaluate("(span) => getComputedStyle(span).backgroundColor") == "rgba(0, 0, 0, 0)"
        token.hover()
        expect(page.get_by_role("tooltip")).to_be_hidden()
    badges = page.locator(".answer .badge").evaluate_all(
        "(all) => all.map((each) => getComputedStyle(each).background)"
    )
    assert badges[0] == badges[1]
    expect(page.get_by_role("status").last).to_have_text("Both are written. Your vote?")

    other = "B" if first == "A" else "A"
    page.get_by_role("button", name="1 is better").click()
    share = "100 % of 1 (95 % interval 3 to 100 %)" if first == "A" else "0 % of 1 (95 % interval 0 to 98 %)"
    expect(page.locator("#tally")).to_have_text(
        f"1 was {first}, 2 was {other}; your vote: {first} is better. "
        f"A {int(first == 'A')}, B {int(first == 'B')}, ties 0: A preferred in {share}."
    )
    assert page.locator(".answer .badge").all_text_contents() == [first, other]
    chips = answers.first.get_by_role("listitem").all_text_contents()
    assert chips == [f"temperature {'0.3' if first == 'A' else '1.3'}"]
    expect(answers.first.locator(".figures")).to_contain_text("2 tokens")
    assert tokens(page, first).text_content() == texts[0]
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    # Without a blind vote, A is first again.
    page.get_by_label("Blind vote").uncheck()
    generate(page)
    assert page.locator(".answer .badge").all_text_contents() == ["A", "B"]


def test_blind_answers_appear_together(page: Page, server: PlayedServer, played: Played) -> None:
    compare_blind(page, server, played)
    played.first_piece_only = True
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("Both answers appear when both are written.")).to_have_count(2)
    expect(page.locator(".tokens")).to_have_text([re.compile("cool|hot")] * 2)
    expect(page.locator(".token").first).to_be_hidden()
    expect(page.get_by_role("button", name="1 is better")).to_be_hidden()
    played.go_on.set()
    expect(page.get_by_role("button", name="1 is better")).to_be_visible()
    expect(tokens(page, "1")).to_be_visible()
    expect(tokens(page, "2")).to_be_visible()


def test_the_order_of_blind_answers_is_random(page: Page, server: PlayedServer, played: Played) -> None:
    compare_blind(page, server, played)
    firsts = page.evaluate("[...Array(64)].map(() => { beginRound(); return round.order[0]; })")
    assert set(firsts) == {"A", "B"}


def test_votes_are_counted_for_the_pair_of_settings(page: Page, server: PlayedServer, played: Played) -> None:
    compare_blind(page, server, played)
    show_first(page, "A")
    cast(page, "1 is better")
    cast(page, "2 is better")
    cast(page, "1 is better")
    tally = cast(page, "No difference")
    expect(tally).to_contain_text("your vote: no difference. A 2, B 1, ties 1: A preferred in 67 % of 3")
    # The same pair with the sides swapped; a value that is the model's own is no other setting.
    field(page, "temperature", "A").fill("1.3")
    field(page, "temperature", "B").fill("0.3")
    field(page, "top_k", "B").fill("50")
    expect(cast(page, "2 is better")).to_contain_text("A 1, B 3, ties 1: A preferred in 25 % of 4")
    # Another pair.
    field(page, "top_k", "B").fill("7")
    expect(cast(page, "1 is better")).to_contain_text("A 1, B 0, ties 0:")

    own = {"max_tokens": 400, "temperature": 0.3, "top_k": 50}
    model = "harbour-tales, version 3, int8, cpu, 0123456789abcdef0123456789abcdef"
    expected = [
        {"model": model, "settings": [own, own | {"temperature": 1.3}], "wins": [3, 1], "ties": 1},
        {"model": model, "settings": [own | {"top_k": 7}, own | {"temperature": 1.3}], "wins": [0, 1], "ties": 0},
    ]
    assert kept_votes(page) == expected
    expect(page.locator("#kept span")).to_have_text("6 votes on 2 pairs of settings in this browser.")
    with page.expect_download() as download:
        page.get_by_role("link", name="Save as JSON").click()
    assert download.value.suggested_filename == "votes.json"
    assert json.loads(download.value.path().read_text()) == kept_votes(page)
    with page.expect_download() as download:
        page.get_by_role("link", name="Save as CSV").click()
    with download.value.path().open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row.values())[3:] for row in rows] == [["3", "1", "1"], ["0", "1", "0"]]
    assert [json.loads(rows[0][name]) for name in ("one", "other")] == kept_votes(page)[0]["settings"]

    # They are there when the page is opened again, until they are cleared.
    open_page(page, server).get_by_label("Compare two settings").check()
    page.get_by_label("Blind vote").check()
    expect(page.locator("#kept span")).to_have_text("6 votes on 2 pairs of settings in this browser.")
    page.once("dialog", lambda dialog: dialog.dismiss())
    page.get_by_role("button", name="Clear all votes").click()
    assert len(kept_votes(page)) == 2
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Clear all votes").click()
    expect(page.locator("#kept")).to_be_hidden()
    assert kept_votes(page) == []


def test_what_is_not_voted_on_is_not_counted(page: Page, server: PlayedServer, played: Played) -> None:
    compare_blind(page, server, played)
    generate(page)
    page.get_by_label("Blind vote").uncheck()
    assert sorted(page.locator(".answer .badge").all_text_contents()) == ["A", "B"]
    expect(page.get_by_role("button", name="1 is better")).to_be_hidden()
    page.get_by_label("Blind vote").check()
    generate(page)
    generate(page)
    expect(page.locator(".answer .badge")).to_have_text(["1", "2"])
    page.get_by_label("Compare two settings").uncheck()
    expect(page.locator("#votes")).to_be_hidden()
    expect(page.get_by_label("Blind vote")).to_be_hidden()
    page.get_by_label("Compare two settings").check()

    played.endless = True
    page.get_by_role("button", name="Generate").click()
    expect(page.locator(".tokens")).to_have_text([re.compile("cool|hot")] * 2)
    page.keyboard.press("Escape")
    expect(page.get_by_role("status").last).to_have_text("Stopped.")
    expect(page.locator(".answer").first.locator(".figures")).to_contain_text("stopped by you")
    expect(page.get_by_role("button", name="1 is better")).to_be_hidden()
    played.endless = False

    field(page, "top_p", "B").fill("1.5")
    generate(page)
    expect(page.get_by_role("button", name="Go to top_p")).to_be_visible()
    expect(page.get_by_role("button", name="1 is better")).to_be_hidden()
    assert kept_votes(page) == []


def test_equal_settings_are_not_voted_on(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server).get_by_label("Compare two settings").check()
    page.get_by_label("Blind vote").check()
    field(page, "temperature", "B").fill("0.80")
    generate(page)
    expect(page.locator("#tally")).to_have_text("A and B have the same settings. Change one of them to vote.")
    expect(page.locator(".answer .badge")).to_have_text(["A", "B"])
    expect(page.get_by_role("button", name="1 is better")).to_be_hidden()


def test_a_vote_is_cast_by_keyboard(page: Page, server: PlayedServer, played: Played) -> None:
    compare_blind(page, server, played)
    for _ in range(2):
        page.keyboard.press("Control+Enter")
        expect(page.get_by_role("group", name="Which answer is better?")).to_be_visible()
        tokens(page, "2").locator(".token").first.focus()
        for name in ("1 is better", "2 is better", "No difference"):
            page.keyboard.press("Tab")
            expect(page.get_by_role("button", name=name)).to_be_focused()
        page.keyboard.press("Space")
    expect(page.locator("#tally")).to_contain_text("A 0, B 0, ties 2.")
    # A vote that is skipped leaves the focus on a control.
    page.keyboard.press("Control+Enter")
    page.get_by_role("button", name="2 is better").focus()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("button", name="Generate")).to_be_focused()
    expect(page.get_by_role("group", name="Which answer is better?")).to_be_visible()


def test_a_browser_that_keeps_nothing_counts_until_the_page_is_closed(
    page: Page, server: PlayedServer, played: Played
) -> None:
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no', 'SecurityError'); } })"
    )
    compare_blind(page, server, played)
    cast(page, "No difference")
    tally = cast(page, "No difference")
    expect(tally).to_contain_text("ties 2. This browser does not keep the votes: save them before you close the page.")


def test_the_interval_of_the_votes_is_clopper_and_pearsons(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    for wins, losses in ((7, 3), (0, 1), (5, 0), (1, 999), (1500, 1400)):
        exact = binomtest(wins, wins + losses).proportion_ci(0.95, method="exact")
        assert page.evaluate(f"intervalOf({wins}, {losses})") == pytest.approx([exact.low, exact.high], abs=1e-9)
    text = "A 7, B 3, ties 2: A preferred in 70 % of 10 (95 % interval 35 to 93 %)."
    assert page.evaluate("describeVotes(7, 3, 2)") == text


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_votes_fit_the_screen(width: int, page: Page, server: PlayedServer, played: Played) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    compare_blind(page, server, played)
    for _ in range(2):
        generate(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="2 is better").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pointing_at_a_token_shows_what_else_was_likely(page: Page, server: PlayedServer, played: Played) -> None:
    generate(open_page(page, server))
    lamp = tokens(page).locator(".token", has_text="lamp")
    lamp.hover()
    detail = page.get_by_role("tooltip")
    expect(detail).to_be_visible()
    expect(detail.locator(".chosen")).to_have_text("␣lamp0.5 %")
    assert detail.get_by_role("listitem").all_inner_texts() == [
        "␣fire\n82 %",
        "␣stove\n10 %",
        "␣lamp\n0.5 %",
    ]
    page.mouse.move(5, 5)
    expect(detail).to_be_hidden()
    surprises = [
        float(each.evaluate("(span) => span.style.getPropertyValue('--surprise')"))
        for each in (lamp, tokens(page).locator(".token", has_text="the"))
    ]
    assert surprises == pytest.approx([4.6 / 5.3, 0], abs=0.001)


def test_the_tint_can_be_switched_off(page: Page, server: PlayedServer, played: Played) -> None:
    generate(open_page(page, server))
    background = "(span) => getComputedStyle(span).backgroundColor"
    lamp = tokens(page).locator(".token", has_text="lamp")
    assert lamp.evaluate(background) != "rgba(0, 0, 0, 0)"
    page.get_by_label("Tint by probability").uncheck()
    assert lamp.evaluate(background) == "rgba(0, 0, 0, 0)"


def test_arrow_keys_move_through_the_tokens(page: Page, server: PlayedServer, played: Played) -> None:
    generate(open_page(page, server))
    detail = page.get_by_role("tooltip").locator(".chosen")
    tokens(page).locator(".token").first.focus()
    expect(detail).to_have_text("␣keeper90 %")
    page.keyboard.press("ArrowRight")
    expect(detail).to_have_text("␣lit50 %")
    page.keyboard.press("ArrowDown")
    expect(detail).to_have_text(".82 %")
    page.keyboard.press("ArrowUp")
    expect(detail).to_have_text("␣keeper90 %")
    page.keyboard.press("End")
    expect(detail).to_have_text(".82 %")
    page.keyboard.press("ArrowLeft")
    # Two tokens, one character.
    assert detail.all_text_contents() == ["␣�14 %", "�74 %"]
    page.keyboard.press("Home")
    expect(detail).to_have_text("␣keeper90 %")
    assert tokens(page).locator("[tabindex='0']").count() == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "detail"
    page.keyboard.press("Escape")
    expect(page.get_by_role("tooltip")).to_be_hidden()


def test_a_text_that_tokens_overlap_is_shown_whole(page: Page, server: PlayedServer, played: Played) -> None:
    """Text is held back if a stop text may begin there, and a stop text is cut out of its token."""
    played.pieces = lambda body: [
        Piece("a", [("a", -0.1, {}), (" EN", -0.2, {})]),
        Piece(" ENtry", [("try", -0.3, {})]),
        Piece(" b.", [(" b. END", -0.4, {})]),
    ]
    generate(open_page(page, server))
    assert tokens(page).locator(".token").all_text_contents() == ["a", " EN", "try", " b."]


def test_an_error_names_and_marks_its_field(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    field(page, "temperature").fill("-1")
    generate(page)
    message = "temperature: -1 is out of range, must be at least 0"
    alert = page.locator(".answer").first.get_by_role("alert")
    expect(alert).to_contain_text(message)
    expect(field(page, "temperature")).to_have_attribute("aria-invalid", "true")
    expect(field(page, "temperature")).to_have_accessible_description(
        f"{message} Below 1, likely tokens are drawn more often; above 1, less often. 0 always takes the likeliest."
    )
    alert.get_by_role("button", name="Go to temperature").click()
    expect(field(page, "temperature")).to_be_focused()
    field(page, "temperature").fill("1")
    expect(field(page, "temperature")).not_to_have_attribute("aria-invalid", "true")
    generate(page)
    expect(alert).to_be_hidden()


def test_the_name_of_a_parameter_inside_the_model_finds_its_field(
    page: Page, server: PlayedServer, played: Played
) -> None:
    open_page(page, server)
    field(page, "max_tokens").fill("0")
    generate(page)
    expect(field(page, "max_tokens")).to_have_attribute("aria-invalid", "true")


def test_each_side_of_a_comparison_has_its_own_errors(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server).get_by_label("Compare two settings").check()
    field(page, "top_p", "B").fill("1.5")
    generate(page)
    expect(field(page, "top_p", "B")).to_have_attribute("aria-invalid", "true")
    expect(field(page, "top_p", "A")).not_to_have_attribute("aria-invalid", "true")
    assert tokens(page, "A").text_content() == TEXT


def test_an_error_in_the_prompt_marks_the_prompt(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server).get_by_label("Prompt", exact=True).fill("x" * (LONGEST_PROMPT + 1))
    generate(page)
    expect(page.get_by_label("Prompt", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#prompt-complaint")).to_have_text("prompt: longer than the context")


def test_a_seed_that_is_no_number_is_not_sent(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    field(page, "seed").fill("seven")
    generate(page)
    expect(field(page, "seed")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".answer").first.get_by_role("alert")).to_contain_text("seed: expected a whole number")
    assert played.bodies == []


def test_an_error_during_a_stream_keeps_the_text_so_far(page: Page, server: PlayedServer, played: Played) -> None:
    played.breaks = "the server is shutting down"
    generate(open_page(page, server))
    expect(page.locator(".answer").first.get_by_role("alert")).to_contain_text("the server is shutting down")
    assert tokens(page).text_content() == TEXT
    expect(page.locator(".figures").first).to_contain_text("error incomplete")


def test_a_full_queue_says_when_to_try_again(page: Page, server: PlayedServer, played: Played) -> None:
    played.queue_full = True
    generate(open_page(page, server))
    alert = page.locator(".answer").first.get_by_role("alert")
    expect(alert).to_contain_text("the queue is full (try again in 2 s)")


def test_a_key_is_asked_for_and_kept(page: Page, server: PlayedServer, played: Played) -> None:
    played.keys = frozenset({"right"})
    page.goto(server.url)
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("The server refused the key.")).to_be_visible()
    key.fill("right")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("harbour-tales")
    expect(key).to_be_hidden()
    open_page(page, server)
    generate(page)
    assert played.authorizations == ["Bearer right"]
    assert tokens(page).text_content() == TEXT
    assert page.evaluate("localStorage.length") == 0


def test_a_request_continues_after_a_key_that_is_needed_later(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    played.keys = frozenset({"right"})
    generate(page)
    page.get_by_label("API key").fill("right")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_role("status").last).to_have_text("8 tokens.")
    assert played.authorizations == [None, "Bearer right"]


def test_the_card_shows_where_the_model_is_from(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    assert page.get_by_role("list", name="The model").get_by_role("listitem").all_text_contents() == [
        "version 3",
        "int8",
        "cpu",
        "context of 512 tokens",
    ]
    entries = dict(zip(page.locator("dt").all_text_contents(), page.locator("dd").all_text_contents(), strict=True))
    assert entries.pop("Registered").startswith("24 Nov 2026")
    assert entries == {
        "Git commit": "43ea123f00 with uncommitted changes",
        "Data md5": "9a0364b9e99b",
        "Base": "openai-community/gpt2-medium",
        "Run": "0123456789ab in MLflow",
    }
    assert page.get_by_role("link", name="in MLflow").get_attribute("href") == played.lineage["run_url"]


def test_a_model_without_a_registry_has_no_empty_lineage(page: Page, server: PlayedServer, played: Played) -> None:
    played.lineage = dict.fromkeys(played.lineage)
    played.decoding = {"context_overflow": "slide", "max_new_tokens": 100}
    open_page(page, server)
    assert page.locator("dl").inner_text().split("\n") == ["Other decoding parameters", 'context_overflow "slide"']


def test_a_change_of_the_model_is_reported(page: Page, server: PlayedServer, played: Played) -> None:
    generate(open_page(page, server))
    expect(page.get_by_text("Another model answers now")).to_have_count(0)
    played.version = "4"
    played.decoding = {"temperature": 0.6}
    generate(page)
    expect(page.get_by_text("Another model answers now: harbour-tales, version 4, int8, cpu.")).to_be_visible()
    expect(page.get_by_role("list", name="The model")).to_contain_text("version 4")
    expect(field(page, "temperature")).to_have_value("0.6")
    page.get_by_role("button", name="Dismiss").click()
    expect(page.get_by_text("Another model answers now")).to_be_hidden()


def test_a_change_before_the_first_answer_is_reported(page: Page, server: PlayedServer, played: Played) -> None:
    open_page(page, server)
    played.version = "4"
    generate(page)
    expect(page.get_by_text("Before, it was harbour-tales, version 3, int8, cpu.")).to_be_visible()


def test_the_answer_can_be_copied_and_continued(
    page: Page, context: BrowserContext, server: PlayedServer, played: Played
) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_page(page, server)
    field(page, "stop").fill("it's")
    generate(page)
    read = "navigator.clipboard.readText()"
    page.get_by_role("button", name="Copy", exact=True).click()
    expect(page.get_by_role("status").last).to_have_text("Answer copied.")
    assert page.evaluate(read) == TEXT
    page.get_by_role("button", name="Copy as curl").click()
    expect(page.get_by_role("status").last).to_have_text("Request copied.")
    command, _, quoted = page.evaluate(read).partition(" -d ")
    assert command == f"curl {server.url}/v1/completions -H 'Content-Type: application/json'"
    body = json.loads(quoted[1:-1].replace("'\\''", "'"))
    assert body == {"prompt": "The", "logprobs": 5, "stop": ["it's"]}
    page.get_by_role("button", name="Continue from here").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("The" + TEXT)


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_nothing_is_wider_than_the_screen(width: int, page: Page, server: PlayedServer, played: Played) -> None:
    played.pieces = lambda body: [piece("unbroken" * 30), piece(" word")]
    page.set_viewport_size({"width": width, "height": 800})
    open_page(page, server).get_by_label("Compare two settings").check()
    field(page, "temperature", "B").fill("-1")
    field(page, "stop", "A").fill("a_rather_long_stop_text_" * 4)
    generate(page)
    tokens(page, "A").locator(".token").first.hover()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sheets = [page.locator(".answer").nth(index).bounding_box() for index in (0, 1)]
    cells = [page.locator("#row-top_p .cell").nth(index).bounding_box() for index in (0, 1)]
    for one, other in (sheets, cells):
        assert (one["x"] == other["x"]) == (width < 620 or (one is sheets[0] and width < 700))
        assert one["x"] + one["width"] <= width


def test_a_tap_shows_the_details(browser: Browser, server: PlayedServer, played: Played) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page = open_page(context.new_page(), server)
    page.get_by_role("button", name="Generate").tap()
    tokens(page).locator(".token", has_text="lamp").tap()
    box = page.get_by_role("tooltip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    context.close()


def test_the_browser_finds_no_fault(page: Page, server: PlayedServer, played: Played, faults: list[str]) -> None:
    open_page(page, server).get_by_label("Compare two settings").check()
    field(page, "temperature", "B").fill("0")
    generate(page)
    tokens(page, "B").locator(".token").first.hover()
    generate(page)
    assert faults == []
    # The policy is there, and is enforced.
    violated = page.evaluate(
        """new Promise((resolve) => {
            addEventListener("securitypolicyviolation", (event) => resolve(event.violatedDirective));
            document.body.insertAdjacentHTML("beforeend", "<p style='color: red'>");
        })"""
    )
    assert violated == "style-src-attr"
    assert "policy: style-src-attr" in faults
    faults.clear()


def test_all_can_be_done_by_keyboard(page: Page, server: PlayedServer, played: Played) -> None:
    generate(open_page(page, server))
    page.get_by_label("Compare two settings").focus()
    page.keyboard.press("Space")
    expect(page.get_by_label("Compare two settings")).to_be_checked()
    field(page, "temperature", "A").fill("0.5")
    controls = page.evaluate(
        """[...document.querySelectorAll("a, button, input, select, textarea, [tabindex='0']")]
            .filter((each) => each.checkVisibility({ visibilityProperty: true }) && !each.disabled)
            .map((each, index) => { each.dataset.stop = index; return each.outerHTML; })"""
    )
    page.locator("[data-stop='0']").focus()
    reached = {0}
    for _ in controls[1:]:
        page.keyboard.press("Tab")
        stop, outline = page.evaluate(
            "[document.activeElement.dataset.stop, getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert outline == "solid", controls[int(stop)]
        reached.add(int(stop))
    assert [control for index, control in enumerate(controls) if index not in reached] == []
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status").last).to_have_text("A: 8 tokens. B: 8 tokens.")


def test_every_control_has_a_name(page: Page, server: PlayedServer, played: Played) -> None:
    generate(open_page(page, server))
    page.get_by_label("Compare two settings").check()
    for control in page.locator("button:visible, input:visible, select:visible, textarea:visible").all():
        expect(control).not_to_have_accessible_name("")


def test_nothing_moves_for_users_who_prefer_that(browser: Browser, server: PlayedServer, played: Played) -> None:
    played.endless = True
    for wish, moves in (("reduce", False), ("no-preference", True)):
        context = browser.new_context(reduced_motion=wish)
        page = open_page(context.new_page(), server)
        page.get_by_role("button", name="Generate").click()
        token = tokens(page).locator(".token").first
        assert (token.evaluate("(span) => getComputedStyle(span).animationName") != "none") == moves
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_contrast_with_their_background(scheme: str, page: Page, server: PlayedServer, played: Played) -> None:
    """Check for a contrast of 4.5, as WCAG 2.2 requires in 1.4.3."""
    page.emulate_media(color_scheme=scheme)
    open_page(page, server)
    pairs = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("paper", "sheet", "wash")]
    for text, ground in [*pairs, ("bad", "bad-wash"), ("bad", "sheet"), ("on-accent", "accent"), ("sheet", "other")]:
        colours = [
            page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
            for name in (text, ground)
        ]
        one, other = sorted(luminance(colour) for colour in colours)
        assert (other + 0.05) / (one + 0.05) >= 4.5, (text, ground)


def test_the_real_server_streams_to_the_page(page: Page, running: "Running") -> None:
    open_page(page, running).get_by_label("Compare two settings").check()
    field(page, "seed").fill("1")
    generate(page)
    assert tokens(page, "A").text_content() == tokens(page, "B").text_content()
    shown = tokens(page, "A").locator(".token")
    assert shown.count() > 0
    shown.first.focus()
    assert page.get_by_role("tooltip").get_by_role("listitem").count() in (5, 6)
    # Every token that was drawn belongs to a piece of the text, or to a character that is not complete.
    counted, held = page.evaluate(
        """[answers.A.count, [...document.querySelectorAll("[data-side=A] .token")]
            .reduce((sum, span) => sum + pieceOf.get(span).tokens.length, answers.A.held.length)]"""
    )
    assert held == counted
    expect(page.locator(".figures").first).to_contain_text("length reached max_tokens or the end of the context")


def test_the_real_server_decodes_by_the_chosen_preset(page: Page, running: "Running") -> None:
    open_page(page, running).get_by_label("preset of A").select_option("faithful")
    expect(field(page, "temperature")).to_have_value("0")
    generate(page)
    (choice,) = running.post(prompt="The", preset="faithful").json()["choices"]
    assert tokens(page).text_content() == choice["text"]


def test_the_real_server_says_which_field_is_wrong(page: Page, running: "Running") -> None:
    open_page(page, running).get_by_label("preset of A").select_option("balanced")
    for name, value in (("top_p", "1.5"), ("max_tokens", "-3"), ("seed", str(2**63)), ("top_k", "0.5")):
        field(page, name).fill(value)
        generate(page)
        expect(field(page, name)).to_have_attribute("aria-invalid", "true")
        page.get_by_role("button", name="Reset all").click()
    page.get_by_label("Prompt", exact=True).fill("word " * 500)
    generate(page)
    expect(page.get_by_label("Prompt", exact=True)).to_have_attribute("aria-invalid", "true")


def luminance(colour: str) -> float:
    channels = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return sum(weight * each for weight, each in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
