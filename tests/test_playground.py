"""The playground in a real browser: pointer and keyboard, light and dark colours, narrow screens, and errors.

Tests with the fixture `server` run against both servers, and take the expected values from the response.
Tests with the fixture `stub` script the response.
"""
import base64
import hashlib
import json
import re
import select
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from conftest import needs_browser
from kdcode.config import EXAMPLE_PROMPT, EXAMPLE_PROMPTS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=120_000)  # ms; a busy machine decodes slowly
pytestmark = needs_browser
PAGE = Path(__file__).parent.parent/"kdcode"/"playground.html"


def drafted(*texts):
    return [{"text": text, "drafted": True} for text in texts]


def by_teacher(text):
    return [{"text": text, "drafted": False}]


# Decoding steps: (tokens, rejected draft tokens)
STEPS = [
    (drafted("    if", " n", " <", " ") + by_teacher("2"), []),
    (drafted(":") + by_teacher("\n        return"), [" ", "1", "\n"]),
    (drafted(" False", "\n") + by_teacher("    for"), ["    return", " True"]),
    (by_teacher(" divisor"), [" i", " in", " range", "("]),
    (drafted(" in", " range"), []),
]
BASELINE_STEPS = [(by_teacher(token["text"]), []) for tokens, _ in STEPS for token in tokens]
# The statistics count draft tokens beyond the end of the last step, so they differ from a count of the steps above.
STATISTICS = {"acceptance_rate": .66, "tokens_per_call": 2.4, "calls": 5, "drafted": [5, 5, 5, 5],
              "verified": [5, 4, 3, 1], "accepted": [4, 3, 1, 1], "seconds": 1.9}
BASELINE_STATISTICS = {"acceptance_rate": None, "tokens_per_call": 1.0, "calls": 13, "drafted": [], "verified": [],
                       "accepted": [], "seconds": 3.1}


class StubServer:
    """Responds like the server, with steps that a test may change."""

    def __init__(self):
        self.model = "smollm2"
        self.steps, self.baseline_steps, self.statistics = STEPS, BASELINE_STEPS, STATISTICS
        self.error = None  # (status, message) for every completion request
        self.key = None  # required API key
        self.ending = "done"  # after the steps: "done", "error" or "cut"
        self.hold_after = None  # wait for `release` after this number of steps
        self.release, self.closed = threading.Event(), threading.Event()
        self.requests, self.accepts = [], []  # bodies and Accept headers
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"stub": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}/"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": .02}, daemon=True).start()

    def stop(self):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


def content_security_policy(page):
    """The server's policy: only the page's own script and style, and requests to its own server."""
    def digest(tag):
        block = re.search(f"<{tag}>(.*?)</{tag}>", page, re.S)[1]
        return base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
    return (f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src 'sha256-{digest('style')}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


class Handler(BaseHTTPRequestHandler):
    stub: StubServer

    def log_message(self, *_): pass

    def reply(self, kind, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items(): self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def reply_error(self, status, message):
        body = {"error": {"message": message, "type": "error", "code": None}}
        self.reply("application/json", json.dumps(body).encode(), status)

    def authorized(self):
        if self.stub.key is None or self.headers["Authorization"] == f"Bearer {self.stub.key}": return True
        self.reply_error(401, "an API key is required")

    def do_GET(self):
        if self.path == "/":
            policy = content_security_policy(PAGE.read_text())
            return self.reply("text/html", PAGE.read_bytes(), **{"Content-Security-Policy": policy})
        if self.path != "/v1/models": return self.reply_error(404, "not found")
        if not self.authorized(): return
        model = {"id": self.stub.model, "object": "model", "created": 0, "owned_by": "kdcode",
                 "speculation": {"gamma": 4, "drafter": "student", "max_tokens": 512}}
        self.reply("application/json", json.dumps({"object": "list", "data": [model]}).encode())

    def do_POST(self):
        stub, request = self.stub, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub.requests.append(request)
        stub.accepts.append(self.headers["Accept"])
        if not self.authorized(): return
        if stub.error: return self.reply_error(*stub.error)
        self.reply("text/event-stream", b": keep-alive\n\n")
        gamma = request["speculation"]["gamma"]
        for i, (tokens, rejected) in enumerate(stub.steps if gamma else stub.baseline_steps):
            if i == stub.hold_after and not self.released(): return
            text = "".join(token["text"] for token in tokens)
            self.choice(text, None, speculation={"tokens": tokens, "rejected": rejected})
        if stub.ending == "cut": return
        if stub.ending == "error": return self.event({"error": {"message": "out of memory"}})
        self.choice("", "length")
        usage = {"prompt_tokens": 9, "completion_tokens": 13, "total_tokens": 22}
        statistics = stub.statistics if gamma else BASELINE_STATISTICS
        self.event({**self.header(), "choices": [], "usage": usage, "speculation": {"statistics": statistics}})
        self.wfile.write(b"data: [DONE]\n\n")

    def released(self):
        while not self.stub.release.wait(.02):
            if select.select([self.connection], [], [], 0)[0]:  # after the request, readable means closed
                self.stub.closed.set()
                return False
        return True

    def header(self): return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "smollm2"}

    def choice(self, text, reason, **fields):
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        self.event({**self.header(), "choices": [choice], "usage": None, **fields})

    def event(self, content):
        self.wfile.write(f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode())


@pytest.fixture
def stub():
    server = StubServer()
    yield server
    server.stop()


@pytest.fixture
def server(request, stub, served):
    """The server of the page: the stub, or kdcode's server with a tiny teacher."""
    if getattr(request, "param", "stub") == "stub": yield stub
    else:
        with served() as (client, _): yield SimpleNamespace(url=str(client.base_url))


both_servers = pytest.mark.parametrize("server", ["stub", "kdcode"], indirect=True)


@pytest.fixture
def console():
    """Errors and warnings in the browser's console. A test fails if any are left at the end."""
    return []


# The browser does not keep responses with Cache-Control: no-store.
RECORD_RESPONSES = """
    const original = window.fetch
    window.fetch = async (path, ...options) => {
        const response = await original(path, ...options)
        if (String(path).endsWith("v1/completions") && window.responses)
            window.responses.push(response.clone().text().catch(() => ""))
        return response
    }"""


@pytest.fixture
def visit(browser, server, console):
    """Open the page. At the end, the console must be empty, and all requests must have gone to the server."""
    contexts, hosts = [], set()

    def log(message):
        if message.type in ("error", "warning"): console.append(message.text)

    def visit(width=1280, motion="reduce", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, reduced_motion=motion, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on("console", log)
        page.on("pageerror", lambda error: console.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url)[:2]))
        page.add_init_script(RECORD_RESPONSES)
        page.goto(server.url)
        return page
    yield visit
    for context in contexts: context.close()
    assert console == []
    assert {host for host in hosts if host[0] != "data"} == {urlsplit(server.url)[:2]}


def run(page, ending="Done"):
    """Run with the current settings, and return the events of each response."""
    page.evaluate("window.responses = []")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("status")).to_contain_text(ending)
    return [[json.loads(line[6:]) for line in response.split("\n") if line.startswith("data: {")]
            for response in page.evaluate("Promise.all(window.responses)")]


def steps_of(events):
    return [event["speculation"] for event in events if event.get("speculation", {}).get("tokens")]


def statistics_of(events):
    return next(event["speculation"]["statistics"] for event in events if "statistics" in event.get("speculation", {}))


def text_of(events):
    return "".join(choice["text"] for event in events for choice in event["choices"])


def displayed_tokens(page):
    return page.locator("#text .token").evaluate_all(
        "tokens => tokens.map(token => ({text: token.textContent, drafted: token.classList.contains('drafted')}))")


def style(page, selector, name, pseudo=None):
    script = "(element, [name, pseudo]) => getComputedStyle(element, pseudo)[name]"
    return page.locator(selector).first.evaluate(script, [name, pseudo])


def expect_failed_requests(console):
    """The browser itself logs every failed request; nothing else may be logged."""
    assert console and all("Failed to load resource" in message for message in console)
    console.clear()


def test_page_satisfies_a_strict_content_security_policy():
    page = PAGE.read_text()
    assert (page.count("<script"), page.count("<style")) == (1, 1)
    markup = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\s(on\w+|style)=", markup)
    external = r"""(?:src|href|action)\s*=\s*["'](?!data:)|url\(|@import"""
    unsafe = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\("
    assert re.findall(f"{external}|{unsafe}", page) == []


@both_servers
def test_tokens_show_their_origin(visit, server):
    page = visit()
    events, _ = run(page)
    tokens = [token for step in steps_of(events) for token in step["tokens"]]
    expected = [{"text": token["text"], "drafted": token["drafted"]} for token in tokens]
    assert displayed_tokens(page) == expected and {token["drafted"] for token in expected} == {True, False}
    assert "".join(token["text"] for token in displayed_tokens(page)) == text_of(events)
    weights = [style(page, selector, "fontWeight") for selector in ("#text .drafted", "#text .teacher")]
    assert weights[0] != weights[1]  # not by colour alone
    decorations = [style(page, selector, "textDecorationLine") for selector in ("#text .drafted", "#text .teacher u")]
    assert decorations == ["none", "underline"]
    for name in ("drafted", "teacher"):
        assert style(page, f".legend .{name}", "color") == style(page, f"#text .{name}", "color")
    model = page.evaluate("fetch('/v1/models').then(response => response.json())")["data"][0]
    expect(page.locator("#model")).to_have_text(model["id"])
    gamma = str(model["speculation"]["gamma"])
    slider = page.get_by_role("slider", name="γ").evaluate("slider => [slider.min, slider.max, slider.value]")
    assert slider == ["0", gamma, gamma]


def test_text_appears_while_it_is_decoded(visit, stub):
    stub.hold_after = 2
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#text .token")).to_have_count(7)
    expect(page.get_by_role("status")).to_have_text("Decoding with drafting…")
    expect(page.locator("#speed")).to_contain_text("tokens/s")
    expect(page.locator("#positions tbody tr").first).to_contain_text("2 of 2, 100%")
    stub.release.set()
    expect(page.get_by_role("status")).to_contain_text("Done")
    expect(page.locator("#text .token")).to_have_count(13)


def test_pointer_shows_rejected_draft_tokens(visit, stub):
    page = visit()
    run(page)
    tip, marks = page.get_by_role("tooltip"), page.locator("#text .mark")
    expect(marks).to_have_count(sum(bool(rejected) for _, rejected in STEPS))
    expect(tip).to_be_hidden()
    marks.nth(2).hover()
    expect(tip).to_have_text("Rejected draft token: ·iDiscarded after it: ·in·range(Teacher’s token: ·divisor")
    page.locator("#text .teacher", has_text="for").hover()  # the teacher's token is a larger target than the mark
    expect(tip).to_contain_text("····return")
    tip.hover()  # the pointer may move onto the tooltip
    expect(tip).to_be_visible()
    page.get_by_role("heading", name="kdcode").hover()
    expect(tip).to_be_hidden()


def test_keyboard_shows_rejected_draft_tokens(visit, stub):
    page = visit()
    run(page)
    tip, marks = page.get_by_role("tooltip"), page.locator("#text").get_by_role("button")
    assert [mark.get_attribute("tabindex") for mark in marks.all()] == ["0", "-1", "-1"]
    page.get_by_role("button", name="Stop").focus()
    page.keyboard.press("Tab")
    expect(marks.first).to_be_focused()
    expect(marks.first).to_have_accessible_name("3 rejected draft tokens")
    description = re.compile("Rejected draft token: · ?Discarded after it: 1 ?↵ ?Teacher’s token: ↵········return")
    expect(marks.first).to_have_accessible_description(description)
    page.keyboard.press("ArrowRight")
    expect(marks.nth(1)).to_be_focused()
    expect(tip).to_contain_text("·True")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.keyboard.press("End")
    expect(marks.last).to_be_focused()
    expect(tip).to_be_visible()
    page.keyboard.press("Tab")  # all marks share one tab stop
    expect(page.locator("summary")).to_be_focused()
    expect(tip).to_be_hidden()


@both_servers
def test_bars_show_the_statistics(visit, server):
    page = visit()
    numbers = statistics_of(run(page)[0])
    rows = page.locator("#positions tbody tr")
    expect(rows).to_have_count(len(numbers["drafted"]))
    for i, (n, verified, accepted) in enumerate(zip(numbers["drafted"], numbers["verified"], numbers["accepted"])):
        expect(rows.nth(i)).to_have_text(re.compile(rf"^{i + 1}\s*{accepted} of {n}, {100*accepted/n:.0f}%$"))
        widths = rows.nth(i).locator(".track").evaluate(
            "track => [track, ...track.children].map(bar => bar.getBoundingClientRect().width)")
        shares = [width / widths[0] for width in widths[1:]]
        assert shares == pytest.approx([accepted / n, (verified - accepted) / n], abs=.01)
    summary = page.locator("#acceptance")
    expect(summary).to_contain_text(f"Tokens per target call: {numbers['tokens_per_call']:.3g}")
    expect(summary).to_contain_text(f"({numbers['calls']} calls)")
    expect(summary).to_contain_text(f"α = {numbers['acceptance_rate']:.2f}")


@both_servers
def test_output_is_compared_with_decoding_without_drafting(visit, server):
    page = visit()
    main, baseline = run(page)
    expect(page.locator("#verdict")).to_have_text("✓ The outputs are identical.")
    prompt = page.get_by_label("Prompt").input_value()
    assert page.locator("#baseline-text").text_content() == prompt + text_of(baseline)
    speeds = [float(re.search(r"([\d.]+) tokens/s", row)[1]) for row in page.locator("#speed tr").all_text_contents()]
    ratio = float(page.locator("#headline").text_content().rstrip("×"))
    assert len(speeds) == 2 and ratio == pytest.approx(speeds[0] / speeds[1], rel=.02, abs=.006)  # all are rounded
    expect(page.get_by_role("status")).to_contain_text(f"speedup {ratio:.2f}")
    page.locator("summary").click()
    expect(page.locator("#baseline-text")).to_be_hidden()


def test_comparison_differs_in_gamma_only(visit, stub):
    page = visit()
    page.get_by_label("Seed").fill("7")
    run(page)
    first, second = stub.requests
    assert stub.accepts == ["text/event-stream"] * 2  # without it, Jupyter's proxy holds the stream back until its end
    assert first == {"prompt": page.get_by_label("Prompt").input_value(), "max_tokens": 128, "temperature": 0,
                     "seed": 7, "model": "smollm2", "stream": True, "stream_options": {"include_usage": True},
                     "speculation": {"gamma": 4, "details": True}}
    assert second == first | {"speculation": {"gamma": 0, "details": True}}


@pytest.mark.parametrize("temperature, message", [
    ("0", "The outputs differ from character 4 on."),
    ("0.7", "The outputs are samples of the same distribution and may differ."),
])
def test_differing_outputs_are_reported(visit, stub, temperature, message):
    stub.baseline_steps = [(by_teacher("   "), []), (by_teacher("while"), [])]
    page = visit()
    stub.steps = [(drafted("   ") + by_teacher("if"), [])]
    page.get_by_label("Temperature").fill(temperature)
    run(page)
    expect(page.locator("#verdict")).to_have_text(message)


@pytest.mark.parametrize("change", ["no comparison", "no drafting"])
def test_without_a_comparison_there_is_one_request(visit, stub, change):
    page = visit()
    if change == "no comparison": page.get_by_label("Compare").uncheck()
    else: page.get_by_label("γ").fill("0")
    run(page)
    assert [request["speculation"]["gamma"] for request in stub.requests] == [4 if change == "no comparison" else 0]
    expect(page.locator("#baseline")).to_be_hidden()
    expect(page.locator("#headline-unit")).to_have_text("tokens/s")


@pytest.mark.parametrize("method", ["button", "key"])
def test_stop_cancels_the_request(visit, stub, method):
    stub.hold_after = 1
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#text .token")).to_have_count(5)
    assert not stub.closed.is_set()
    if method == "button": page.get_by_role("button", name="Stop").click()
    else: page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped after 5 tokens.")
    assert stub.closed.wait(30)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(stub.requests) == 1  # no comparison after a stop
    stub.hold_after = None
    run(page)
    expect(page.locator("#text .token")).to_have_count(13)


@pytest.mark.parametrize("error", [(400, "temperature must not be below 0"), (429, "the request queue is full")])
def test_error_status_is_shown(visit, stub, console, error):
    stub.error = error
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text(f"The server returned an error ({error[0]}): {error[1]}")
    expect_failed_requests(console)
    stub.error = None
    run(page)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_prompt_without_text_is_refused(visit, stub):
    page = visit()
    prompt = page.get_by_label("Prompt")
    prompt.fill("  \n\t ")
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text("The prompt has no text; write the beginning of a program.")
    page.get_by_label("Prompt").fill("x = 1")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.get_by_label("Example").evaluate("list => list.selectedIndex") == -1
    assert stub.requests == []
    prompt.fill("def f(x):")
    run(page)
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("ending, message", [
    ("error", "The server stopped with an error: out of memory"),
    ("cut", "The response ended before it was complete."),
])
def test_broken_stream_is_shown(visit, stub, ending, message):
    stub.ending = ending
    page = visit()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text(message)
    expect(page.locator("#text .token")).to_have_count(13)
    stub.ending = "done"
    run(page)


def test_unreachable_server_is_shown(visit, stub, console):
    page = visit()
    expect(page.locator("#model")).to_have_text("smollm2")
    stub.stop()
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it running?")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    expect_failed_requests(console)


def test_api_key_is_requested_and_sent(visit, stub, console):
    page = visit()
    expect(page.locator("#model")).to_have_text("smollm2")
    expect(page.get_by_label("API key")).to_be_hidden()
    stub.key = "a-key"
    page.reload()
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.get_by_role("alert")).to_contain_text("an API key is required")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_label("API key").fill("a-key")
    run(page)
    expect(page.locator("#model")).to_have_text("smollm2")
    expect_failed_requests(console)
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_markup_in_model_output_is_shown_as_text(visit, stub, console):
    attack = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    stub.steps = [(drafted(attack) + by_teacher(attack), [attack, attack])]
    stub.baseline_steps = [(by_teacher(attack), [])]
    page = visit()
    page.get_by_label("Prompt").fill(attack)
    run(page)
    page.locator("#text .mark").focus()
    assert [token["text"] for token in displayed_tokens(page)] == [attack, attack]
    expect(page.get_by_role("tooltip")).to_contain_text(attack.replace(" ", "·"))
    stub.error = (400, attack)
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text(attack)
    expect_failed_requests(console)
    assert page.locator("img").count() == 0 and page.title() == "kdcode playground"


@pytest.mark.parametrize("width", [320, 400, 800, 1280])
def test_nothing_scrolls_sideways(visit, stub, width):
    long = "x" * 200
    short_steps = [(drafted(" short") + by_teacher(" word"), [" of"] * 8)] * 20
    stub.steps = STEPS + short_steps + [(drafted(long) + by_teacher(long), [long, long])]
    page = visit(width)
    run(page)
    edges = page.locator("#text .mark").evaluate_all("""marks => marks.map(mark => {
        mark.focus();
        const tip = document.getElementById("tip").getBoundingClientRect();
        return [mark.getBoundingClientRect().left, tip.left, tip.right, document.documentElement.scrollWidth];
    })""")
    assert max(mark for mark, *_ in edges) > min(width - 100, 600)  # some marks are close to the right edge
    assert all(0 <= left < right <= width and scroll <= width for _, left, right, scroll in edges), edges


def test_keyboard_alone_is_enough(visit, stub):
    page = visit()
    expect(page.locator("#model")).to_have_text("smollm2")
    order = []
    for key in ("", "", "ArrowLeft", "ArrowRight", "", "", "Space", "", ""):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
        if order[-1] == "prompt": page.keyboard.type("def f():")
        if key: page.keyboard.press(key)
    assert order == ["example", "prompt", "gamma", "temperature", "max-tokens", "seed", "compare", "run", "stop"]
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_contain_text("Done")
    request, = stub.requests
    assert request["prompt"].endswith("def f():")
    assert (request["speculation"]["gamma"], request["temperature"]) == (3, .1)


def test_examples_are_those_of_the_library(visit, stub):
    page = visit()
    example, prompt = page.get_by_label("Example"), page.get_by_label("Prompt")
    assert prompt.input_value() == EXAMPLE_PROMPT
    assert example.locator("option").all_text_contents() == list(EXAMPLE_PROMPTS)
    for name, text in reversed(EXAMPLE_PROMPTS.items()):
        example.select_option(name)
        assert prompt.input_value() == text
    run(page)
    assert stub.requests[0]["prompt"] == EXAMPLE_PROMPT


@pytest.mark.parametrize("prompt", ["x" * 50_000, "x\n" * 25_000, "x" + "\n" * 50_000],
                         ids=["line", "lines", "empty lines"])
def test_a_long_prompt_is_shown_shortened(visit, stub, console, prompt):
    """Refused or not: the page stays short, and the request has the whole prompt."""
    page = visit()
    stub.error = (400, f"the prompt is too long: {prompt}")
    page.get_by_label("Prompt").evaluate("(element, text) => { element.value = text }", prompt)  # typing takes minutes
    page.get_by_role("button", name="Run").click()
    expect(page.get_by_role("alert")).to_contain_text("not shown")
    expect(page.locator("#text")).to_contain_text("characters not shown")
    assert page.evaluate("document.documentElement.scrollHeight") < 6000
    expect_failed_requests(console)
    stub.error = None
    run(page)
    assert [request["prompt"] for request in stub.requests] == [prompt] * 3
    assert page.evaluate("document.documentElement.scrollHeight") < 6000
    assert page.locator("#text").text_content().endswith("".join(token["text"] for token in displayed_tokens(page)))


def test_baselines_are_named_as_in_the_readme(visit, stub):
    """The same sentence says what a speedup is over, in the README and beside the number in the playground."""
    page = visit()
    run(page)
    expect(page.locator("#headline-unit")).to_have_text("speedup over kdcode without drafting")
    readme = (PAGE.parent.parent/"README.md").read_text().replace("`", "")
    assert page.locator("#baselines").text_content() in readme
    expect(page.get_by_text("so the same prompt is faster the second time")).to_be_visible()


@pytest.mark.parametrize("model", ["smollm2", "qwen2.5-coder-1.5b"])
def test_page_says_what_the_embedded_teacher_shows(visit, stub, model):
    stub.model = model
    page = visit()
    expect(page.locator("#model")).to_have_text(model)
    sentence = page.get_by_text("it shows speed and identical outputs, not skill")
    expect(sentence).to_be_visible(visible=model == "smollm2")


def test_every_control_has_an_accessible_name(visit, stub):
    page = visit()
    run(page)
    page.evaluate("document.getElementById('key-field').hidden = false")
    selector = "button, input, textarea, form, section, table, summary, [role]"
    controls = page.locator(selector).locator("visible=true").all()
    assert len(controls) > 15
    for control in controls:
        if control.get_attribute("role") not in ("status", "alert"):
            expect(control).to_have_accessible_name(re.compile(r"\w"))
    tree = page.locator("body").aria_snapshot()
    assert not re.search(r"- (button|textbox|slider|spinbutton|checkbox|table|region|form)(:|$|\n| \[)", tree), tree
    for line in ('heading "kdcode playground" [level=1]', 'textbox "Prompt"',
                 'slider "Draft tokens per target call, γ"', 'button "3 rejected draft tokens"',
                 'rowheader "with drafting"', 'rowheader "without drafting"'):
        assert line in tree, tree


def test_screen_reader_hears_status_changes_only(visit, stub):
    page = visit()
    page.evaluate("""() => {
        window.messages = [];
        const status = document.getElementById("status");
        new MutationObserver(() => messages.push(status.textContent)).observe(status, {childList: true});
    }""")
    run(page)
    messages = page.evaluate("messages")
    assert messages[:2] == ["Decoding with drafting…", "Decoding without drafting, for comparison…"]
    assert messages[2].startswith("Done: 13 tokens, 9 of them drafted") and len(messages) == 3
    assert page.locator("[aria-live], [role=status], [role=alert], output").count() == 2  # no other live regions


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, stub, scheme):
    """WCAG 2.2 AA: a contrast of 4.5 for text, 3 for other visible elements."""
    page = visit(color_scheme=scheme)
    run(page)
    page.locator("#text .mark").first.focus()

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= .04045 else ((part + .055) / 1.055)**2.4 for part in parts]
        return sum(weight * part for weight, part in zip((.2126, .7152, .0722), linear))

    def contrast(selector, background, name="color", pseudo=None):
        colours = (style(page, selector, name, pseudo), style(page, background, "backgroundColor"))
        dark, bright = sorted(map(luminance, colours))
        return (bright + .05) / (dark + .05)

    assert (luminance(style(page, "body", "backgroundColor")) < .1) == (scheme == "dark")
    for selector in (".prompt", "#baseline-text", "h2", "#status", "#tip .rejected", "#tip .discarded", "label span"):
        assert contrast(selector, ".card") >= 4.5, selector
    for selector, background in (("#text .drafted", "#text .drafted"), ("#text .teacher", "#text .teacher"),
                                 ("header p", "body"), ("#run", "#run"), ("#prompt", "#prompt")):
        assert contrast(selector, background) >= 4.5, selector
    for selector, name, background in ((".track .accepted", "backgroundColor", ".track"),
                                       (".track .baseline", "backgroundColor", ".track"),
                                       ("#prompt", "borderTopColor", ".card")):
        assert contrast(selector, background, name) >= 3, selector
    assert contrast("#text .mark", ".card", "borderTopColor", "::before") >= 3


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_animations_respect_reduced_motion(visit, stub, motion):
    page = visit(motion=motion)
    run(page)
    animated = (style(page, "#text .token", "animationName") != "none",
                style(page, ".track .accepted", "transitionDuration") != "0s")
    assert animated == ((False, False) if motion == "reduce" else (True, True))
