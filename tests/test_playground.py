"""The playground as a person uses it: a real browser, with a pointer or with keys alone, in light and dark, on a narrow screen, and when things go wrong.

Tests that take `server` hold for every server of the page, as they read what it answered; those that take `stand_in` script what it says."""
import base64
import hashlib
import json
import re
import select
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
PAGE = Path(__file__).parent.parent/"kdcode"/"playground.html"


def drafted(*texts): return [{"text": text, "drafted": True} for text in texts]


def own(text): return [{"text": text, "drafted": False}]


# Each round: its tokens, and the rejected drafts.
ROUNDS = [(drafted("    if", " n", " <", " ") + own("2"), []), (drafted(":") + own("\n        return"), [" ", "1", "\n"]), (drafted(" False", "\n") + own("    for"), ["    return", " True"]),
          (own(" divisor"), [" i", " in", " range", "("]), (drafted(" in", " range"), [])]
ALONE = [(own(token["text"]), []) for tokens, _ in ROUNDS for token in tokens]
# The last round's drafts beyond the text's end count as drafted, so these are not what a reader of the rounds alone would count.
STATISTICS = {"acceptance_rate": .66, "tokens_per_call": 2.4, "calls": 5, "drafted": [5, 5, 5, 5], "verified": [5, 4, 3, 1], "accepted": [4, 3, 1, 1], "seconds": 1.9}


class StandIn:
    """Answers as the server does, from a script that a test may change."""
    def __init__(self):
        self.rounds, self.alone, self.statistics = ROUNDS, ALONE, STATISTICS
        self.refusal = None  # status and message
        self.token = None  # asked for where it is set
        self.ending = "done"  # or "error" or "cut", which come after the rounds
        self.hold_after, self.release, self.closed = None, threading.Event(), threading.Event()  # waits after so many rounds
        self.requests = []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"stand_in": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": .02}, daemon=True).start()

    def stop(self):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


def policy(page):
    """What the server allows the page: its own script, its own style, its own server."""
    script, style = (base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1].encode()).digest()).decode() for tag in ("script", "style"))
    return f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


class Handler(BaseHTTPRequestHandler):
    stand_in: StandIn

    def log_message(self, *_): pass

    def reply(self, kind, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message): self.reply("application/json", json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode(), status)

    def admitted(self):
        if self.stand_in.token is None or self.headers["Authorization"] == f"Bearer {self.stand_in.token}": return True
        self.refuse(401, "this server wants a token")

    def do_GET(self):
        if self.path == "/": return self.reply("text/html", PAGE.read_bytes(), **{"Content-Security-Policy": policy(PAGE.read_text())})
        if self.path != "/v1/models": return self.refuse(404, "there is nothing here")
        if not self.admitted(): return
        model = {"id": "smollm2", "object": "model", "created": 0, "owned_by": "kdcode", "speculation": {"gamma": 4, "drafter": "student", "max_tokens": 512}}
        self.reply("application/json", json.dumps({"object": "list", "data": [model]}).encode())

    def do_POST(self):
        script, asked = self.stand_in, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        script.requests.append(asked)
        if not self.admitted(): return
        if script.refusal: return self.refuse(*script.refusal)
        self.reply("text/event-stream")
        gamma = asked["speculation"]["gamma"]
        for i, (tokens, rejected) in enumerate(script.rounds if gamma else script.alone):
            if i == script.hold_after and not self.released(): return
            self.choice("".join(token["text"] for token in tokens), None, speculation={"tokens": tokens, "rejected": rejected})
        if script.ending == "cut": return
        if script.ending == "error": return self.event({"error": {"message": "the teacher ran out of memory"}})
        self.choice("", "length")
        nothing = {"acceptance_rate": None, "tokens_per_call": 1.0, "calls": 13, "drafted": [], "verified": [], "accepted": [], "seconds": 3.1}
        self.event({**self.frame(), "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 13, "total_tokens": 22}, "speculation": {"statistics": script.statistics if gamma else nothing}})
        self.wfile.write(b"data: [DONE]\n\n")

    def released(self):
        while not self.stand_in.release.wait(.02):
            if select.select([self.connection], [], [], 0)[0]:  # after its body, a client only closes
                self.stand_in.closed.set()
                return False
        return True

    def frame(self): return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "smollm2"}

    def choice(self, text, reason, **more): self.event({**self.frame(), "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}], "usage": None, **more})

    def event(self, content):
        self.wfile.write(f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode())


@pytest.fixture
def stand_in():
    server = StandIn()
    yield server
    server.stop()


@pytest.fixture
def server(request, stand_in, served):
    """What serves the page and the interface behind it: the stand-in, or our server with a tiny teacher."""
    if getattr(request, "param", "stand-in") == "stand-in": yield stand_in
    else:
        with served() as (client, _): yield SimpleNamespace(url=str(client.base_url))


both = pytest.mark.parametrize("server", ["stand-in", "kdcode"], indirect=True)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def complaints():
    """What the browser's console complains about; anything left in it at the end is a failure."""
    return []


OVERHEAR = """
    const ask = window.fetch
    window.fetch = async (place, ...how) => {
        const reply = await ask(place, ...how)
        if (String(place).endsWith("v1/completions") && window.answers) window.answers.push(reply.clone().text().catch(() => ""))
        return reply
    }"""  # a browser doesn't keep what a server tells it not to store


@pytest.fixture
def visit(browser, server, complaints):
    """Opens the page; at the end, nothing was complained about and no request went elsewhere."""
    contexts, hosts = [], set()

    def visit(width=1280, motion="reduce", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, reduced_motion=motion, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url)[:2]))
        page.add_init_script(OVERHEAR)
        page.goto(server.url)
        return page
    yield visit
    for context in contexts: context.close()
    assert complaints == []
    assert {place for place in hosts if place[0] != "data"} == {urlsplit(server.url)[:2]}


def run(page, ending="Done"):
    """Runs what the page is set to, and returns the events of each answer."""
    page.evaluate("window.answers = []")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text(ending)
    return [[json.loads(line[6:]) for line in answer.split("\n") if line.startswith("data: {")] for answer in page.evaluate("Promise.all(window.answers)")]


def rounds(events): return [event["speculation"] for event in events if event.get("speculation", {}).get("tokens")]


def statistics(events): return next(event["speculation"]["statistics"] for event in events if "statistics" in event.get("speculation", {}))


def text(events): return "".join(choice["text"] for event in events for choice in event["choices"])


def shown(page): return page.locator("#text .token").evaluate_all("tokens => tokens.map(token => ({text: token.textContent, drafted: token.classList.contains('drafted')}))")


def style(page, selector, name, pseudo=None): return page.locator(selector).first.evaluate("(element, [name, pseudo]) => getComputedStyle(element, pseudo)[name]", [name, pseudo])


def refused(complaints):
    """A browser's console notes each refused or lost request by itself."""
    assert complaints and all("Failed to load resource" in complaint for complaint in complaints)
    complaints.clear()


def test_page_is_one_file_without_what_a_strict_policy_forbids():
    page = PAGE.read_text()
    assert (page.count("<script"), page.count("<style")) == (1, 1)
    markup = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\s(on\w+|style)=", markup)
    assert re.findall(r"""(?:src|href|action)\s*=\s*["'](?!data:)|url\(|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(""", page) == []


@both
def test_tokens_say_who_wrote_them(visit, server):
    page = visit()
    events, _ = run(page)
    expected = [{"text": token["text"], "drafted": token["drafted"]} for step in rounds(events) for token in step["tokens"]]
    assert shown(page) == expected and {token["drafted"] for token in expected} == {True, False}
    assert "".join(token["text"] for token in shown(page)) == text(events)
    assert style(page, "#text .drafted", "fontWeight") != style(page, "#text .own", "fontWeight")  # not by colour alone
    assert (style(page, "#text .drafted", "textDecorationLine"), style(page, "#text .own u", "textDecorationLine")) == ("none", "underline")
    for name in ("drafted", "own"): assert style(page, f".legend .{name}", "color") == style(page, f"#text .{name}", "color")
    model = page.evaluate("fetch('/v1/models').then(reply => reply.json())")["data"][0]
    expect(page.locator("#model")).to_have_text(model["id"])
    gamma = str(model["speculation"]["gamma"])
    assert page.get_by_role("slider", name="γ").evaluate("slider => [slider.min, slider.max, slider.value]") == ["0", gamma, gamma]


def test_text_appears_as_it_is_verified(visit, stand_in):
    stand_in.hold_after = 2
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#text .token")).to_have_count(7)
    expect(page.get_by_role("status")).to_have_text("Decoding with drafts…")
    expect(page.locator("#speed")).to_contain_text("tokens/s")
    expect(page.locator("#positions tbody tr").first).to_contain_text("2 of 2, 100%")
    stand_in.release.set()
    expect(page.get_by_role("status")).to_contain_text("Done")
    expect(page.locator("#text .token")).to_have_count(13)


def test_rejected_drafts_are_shown_to_the_pointer(visit, stand_in):
    page = visit()
    run(page)
    tip, marks = page.get_by_role("tooltip"), page.locator("#text .mark")
    expect(marks).to_have_count(sum(bool(rejected) for _, rejected in ROUNDS))
    expect(tip).to_be_hidden()
    marks.nth(2).hover()
    expect(tip).to_have_text("Refused by the teacher: ·iFell with it: ·in·range(Written instead: ·divisor")
    page.locator("#text .own", has_text="for").hover()  # what the teacher wrote instead is a larger target
    expect(tip).to_contain_text("····return")
    tip.hover()  # the pointer may move onto it
    expect(tip).to_be_visible()
    page.get_by_role("heading", name="kdcode").hover()
    expect(tip).to_be_hidden()


def test_rejected_drafts_are_shown_to_the_keyboard(visit, stand_in):
    page = visit()
    run(page)
    tip, marks = page.get_by_role("tooltip"), page.locator("#text").get_by_role("button")
    assert [mark.get_attribute("tabindex") for mark in marks.all()] == ["0", "-1", "-1"]
    page.get_by_role("button", name="Stop").focus()
    page.keyboard.press("Tab")
    expect(marks.first).to_be_focused()
    expect(marks.first).to_have_accessible_name("3 rejected drafts")
    expect(marks.first).to_have_accessible_description(re.compile("Refused by the teacher: · ?Fell with it: 1 ?↵ ?Written instead: ↵········return"))
    page.keyboard.press("ArrowRight")
    expect(marks.nth(1)).to_be_focused()
    expect(tip).to_contain_text("·True")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.keyboard.press("End")
    expect(marks.last).to_be_focused()
    expect(tip).to_be_visible()
    page.keyboard.press("Tab")  # all marks are one stop
    expect(page.locator("summary")).to_be_focused()
    expect(tip).to_be_hidden()


@both
def test_bars_are_the_statistics(visit, server):
    page = visit()
    numbers = statistics(run(page)[0])
    rows = page.locator("#positions tbody tr")
    expect(rows).to_have_count(len(numbers["drafted"]))
    for i, (n, verified, accepted) in enumerate(zip(numbers["drafted"], numbers["verified"], numbers["accepted"])):
        expect(rows.nth(i)).to_have_text(re.compile(rf"^{i + 1}\s*{accepted} of {n}, {100*accepted/n:.0f}%$"))
        widths = rows.nth(i).locator(".track").evaluate("track => [track, ...track.children].map(bar => bar.getBoundingClientRect().width)")
        assert [width / widths[0] for width in widths[1:]] == pytest.approx([accepted / n, (verified - accepted) / n], abs=.01)
    expect(page.locator("#acceptance")).to_contain_text(f"{numbers['calls']} teacher calls, {numbers['tokens_per_call']:.3g}")
    expect(page.locator("#acceptance")).to_contain_text(f"α = {numbers['acceptance_rate']:.2f}")


@both
def test_teacher_alone_is_compared(visit, server):
    page = visit()
    main, alone = run(page)
    expect(page.locator("#verdict")).to_have_text("✓ Both texts are identical.")
    assert page.locator("#alone-text").text_content() == page.get_by_label("Prompt").input_value() + text(alone)
    speeds = [float(re.search(r"([\d.]+) tokens/s", row)[1]) for row in page.locator("#speed tr").all_text_contents()]
    ratio = float(page.locator("#headline").text_content().rstrip("×"))
    assert len(speeds) == 2 and ratio == pytest.approx(speeds[0] / speeds[1], rel=.02, abs=.006)  # all three are rounded
    expect(page.get_by_role("status")).to_contain_text(f"{ratio:.2f} times as fast")
    page.locator("summary").click()
    expect(page.locator("#alone-text")).to_be_hidden()


def test_same_request_goes_out_without_drafts(visit, stand_in):
    page = visit()
    page.get_by_label("Seed").fill("7")
    run(page)
    first, second = stand_in.requests
    assert first == {"prompt": page.get_by_label("Prompt").input_value(), "max_tokens": 128, "temperature": 0, "seed": 7, "model": "smollm2", "stream": True, "stream_options": {"include_usage": True},
                     "speculation": {"gamma": 4, "details": True}}
    assert second == first | {"speculation": {"gamma": 0, "details": True}}


@pytest.mark.parametrize("temperature, words", [("0", "The texts differ from character 4 on."), ("0.7", "Both texts are samples of the same law, so they may differ.")])
def test_differing_texts_are_told(visit, stand_in, temperature, words):
    stand_in.alone = [(own("   "), []), (own("while"), [])]
    page = visit()
    stand_in.rounds = [(drafted("   ") + own("if"), [])]
    page.get_by_label("Temperature").fill(temperature)
    run(page)
    expect(page.locator("#verdict")).to_have_text(words)


@pytest.mark.parametrize("change", ["no comparison", "no drafts"])
def test_one_request_where_there_is_nothing_to_compare(visit, stand_in, change):
    page = visit()
    if change == "no comparison": page.get_by_label("Compare").uncheck()
    else: page.get_by_label("γ").fill("0")
    run(page)
    assert [asked["speculation"]["gamma"] for asked in stand_in.requests] == [4 if change == "no comparison" else 0]
    expect(page.locator("#alone")).to_be_hidden()
    expect(page.locator("#headline-unit")).to_have_text("tokens/s")


@pytest.mark.parametrize("way", ["button", "key"])
def test_stop_ends_the_request_and_the_page_runs_again(visit, stand_in, way):
    stand_in.hold_after = 1
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#text .token")).to_have_count(5)
    assert not stand_in.closed.is_set()
    if way == "button": page.get_by_role("button", name="Stop").click()
    else: page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped after 5 tokens.")
    assert stand_in.closed.wait(10)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(stand_in.requests) == 1  # nothing is left to compare
    stand_in.hold_after = None
    run(page)
    expect(page.locator("#text .token")).to_have_count(13)


@pytest.mark.parametrize("refusal", [(400, "temperature must not be below 0"), (429, "3 requests are waiting")])
def test_refusal_is_shown_and_the_page_lives_on(visit, stand_in, complaints, refusal):
    stand_in.refusal = refusal
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text(f"The server refused the request ({refusal[0]}): {refusal[1]}")
    refused(complaints)
    stand_in.refusal = None
    run(page)
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("ending, words", [("error", "The server gave up: the teacher ran out of memory"), ("cut", "The server ended the answer before it was complete.")])
def test_broken_answer_is_shown_and_the_page_lives_on(visit, stand_in, ending, words):
    stand_in.ending = ending
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text(words)
    expect(page.locator("#text .token")).to_have_count(13)
    stand_in.ending = "done"
    run(page)


def test_server_that_is_gone_is_told(visit, stand_in, complaints):
    page = visit()
    expect(page.locator("#model")).to_have_text("smollm2")
    stand_in.stop()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it still running?")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    refused(complaints)


def test_token_is_asked_for_and_sent(visit, stand_in, complaints):
    page = visit()
    expect(page.locator("#model")).to_have_text("smollm2")
    expect(page.get_by_label("API token")).to_be_hidden()
    stand_in.token = "a-token"
    page.reload()
    expect(page.get_by_label("API token")).to_be_focused()
    expect(page.get_by_role("alert")).to_contain_text("this server wants a token")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_label("API token").fill("a-token")
    run(page)
    expect(page.locator("#model")).to_have_text("smollm2")
    refused(complaints)
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_markup_in_the_text_stays_text(visit, stand_in, complaints):
    attack = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    stand_in.rounds, stand_in.alone = [(drafted(attack) + own(attack), [attack, attack])], [(own(attack), [])]
    page = visit()
    page.get_by_label("Prompt").fill(attack)
    run(page)
    page.locator("#text .mark").focus()
    assert [token["text"] for token in shown(page)] == [attack, attack]
    expect(page.get_by_role("tooltip")).to_contain_text(attack.replace(" ", "·"))
    stand_in.refusal = (400, attack)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text(attack)
    refused(complaints)
    assert page.locator("img").count() == 0 and page.title() == "kdcode playground"


@pytest.mark.parametrize("width", [320, 400, 800, 1280])
def test_nothing_scrolls_sideways(visit, stand_in, width):
    long = "x" * 200
    stand_in.rounds = ROUNDS + [(drafted(" short") + own(" word"), [" of"] * 8)] * 20 + [(drafted(long) + own(long), [long, long])]
    page = visit(width)
    run(page)
    edges = page.locator("#text .mark").evaluate_all("""marks => marks.map(mark => {
        mark.focus();
        const tip = document.getElementById("tip").getBoundingClientRect();
        return [mark.getBoundingClientRect().left, tip.left, tip.right, document.documentElement.scrollWidth];
    })""")
    assert max(mark for mark, *_ in edges) > min(width - 100, 600)  # there are marks far to the right
    assert all(0 <= left < right <= width and scroll <= width for _, left, right, scroll in edges), edges


def test_keyboard_alone_is_enough(visit, stand_in):
    page = visit()
    expect(page.locator("#model")).to_have_text("smollm2")
    order = []
    for key in ("", "ArrowLeft", "ArrowRight", "", "", "Space", "", ""):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
        if order[-1] == "prompt": page.keyboard.type("def f():")
        if key: page.keyboard.press(key)
    assert order == ["prompt", "gamma", "temperature", "max-tokens", "seed", "compare", "run", "stop"]
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Done")
    asked, = stand_in.requests
    assert asked["prompt"].endswith("def f():") and (asked["speculation"]["gamma"], asked["temperature"]) == (3, .1)


def test_every_control_has_a_name(visit, stand_in):
    page = visit()
    run(page)
    page.evaluate("document.getElementById('token-field').hidden = false")
    controls = page.locator("button, input, textarea, form, section, table, summary, [role]").locator("visible=true").all()
    assert len(controls) > 15
    for control in controls:
        if control.get_attribute("role") not in ("status", "alert"): expect(control).to_have_accessible_name(re.compile(r"\w"))
    tree = page.locator("body").aria_snapshot()
    assert not re.search(r"- (button|textbox|slider|spinbutton|checkbox|table|region|form)(:|$|\n| \[)", tree), tree
    for line in ('heading "kdcode playground" [level=1]', 'textbox "Prompt"', 'slider "Drafts per call, γ"', 'button "3 rejected drafts"', 'rowheader "teacher alone"'): assert line in tree, tree


def test_screen_reader_is_told_little(visit, stand_in):
    page = visit()
    page.evaluate("""() => { window.said = []; new MutationObserver(() => said.push(document.getElementById("status").textContent)).observe(document.getElementById("status"), {childList: true}); }""")
    run(page)
    said = page.evaluate("said")
    assert said[:2] == ["Decoding with drafts…", "Decoding with the teacher alone, to compare…"] and said[2].startswith("Done: 13 tokens, 9 of them drafted") and len(said) == 3
    assert page.locator("[aria-live], [role=status], [role=alert], output").count() == 2  # and nothing else speaks by itself


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart(visit, stand_in, scheme):
    """Contrast of WCAG 2.2 AA: 4.5 for text, 3 for what else has to be seen."""
    page = visit(color_scheme=scheme)
    run(page)
    page.locator("#text .mark").first.focus()

    def light(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        return sum(weight * (part / 12.92 if part <= .04045 else ((part + .055) / 1.055)**2.4) for weight, part in zip((.2126, .7152, .0722), parts))

    def contrast(selector, behind, name="color", pseudo=None):
        bright, dim = sorted((light(style(page, selector, name, pseudo)), light(style(page, behind, "backgroundColor"))), reverse=True)
        return (bright + .05) / (dim + .05)
    assert (light(style(page, "body", "backgroundColor")) < .1) == (scheme == "dark")
    for selector in (".prompt", "#alone-text", "h2", "#status", "#tip .refused", "#tip .fallen", "label span"): assert contrast(selector, ".card") >= 4.5, selector
    for selector, behind in (("#text .drafted", "#text .drafted"), ("#text .own", "#text .own"), ("header p", "body"), ("#run", "#run"), ("#prompt", "#prompt")): assert contrast(selector, behind) >= 4.5, selector
    for selector, name, behind in ((".track .accepted", "backgroundColor", ".track"), (".track .alone", "backgroundColor", ".track"), ("#prompt", "borderTopColor", ".card")):
        assert contrast(selector, behind, name) >= 3, selector
    assert contrast("#text .mark", ".card", "borderTopColor", "::before") >= 3


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_motion_is_left_out_where_it_is_not_wanted(visit, stand_in, motion):
    page = visit(motion=motion)
    run(page)
    moves = (style(page, "#text .token", "animationName") != "none", style(page, ".track .accepted", "transitionDuration") != "0s")
    assert moves == ((False, False) if motion == "reduce" else (True, True))
