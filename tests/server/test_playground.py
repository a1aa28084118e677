"""The playground in a real browser, on a real server: one of each for all tests.

Broken by: a page that marks other words than the user selects, sends something else than it shows,
calls another host, keeps the API key, or cannot be used from the keyboard or on a phone.
"""

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from last_row import last_row
from PIL import Image
from servers import SERVE, VLLM, http, running

from vllm_pasta.verify.oracle import Steering

KEY = "not-to-be-kept"
AUTH = {"Authorization": f"Bearer {KEY}"}
PROMPT = (
    "Previously, Hermann Staudinger was a citizen of Germany. Currently, Hermann Staudinger was a "
    "citizen of Brazil. Hermann Staudinger was a citizen of"
)
FACT = "Hermann Staudinger was a citizen of Brazil"
QUESTION = "Name a colour. Answer in JSON."
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PICTURES = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser, smollm2, tmp_path_factory):
    """Without VLLM_PLUGINS: the flag alone brings the page and its routes."""
    command = [VLLM, "serve", smollm2, *SERVE, "--pasta-playground", "--api-key", KEY,
               "--pasta-heads", "smollm2-135m-instruct", "--pasta-alpha", "0.01"]  # fmt: skip
    with running([(command, {})], tmp_path_factory.mktemp("log"), are_prepared=True) as (url,):
        yield url


@pytest.fixture
def visit(browser, server):
    """Opens the page as a new visitor, and gives the key; watches what the page does.

    After the test: no error on the console but refusals, and no request to another host.
    """
    contexts, errors, hosts = [], [], set()

    def visit(state=None, key=KEY, **options):
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=server)
        page = context.new_page()
        page.set_default_timeout(120_000)  # a machine with other work beside it is slow
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else 0)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(f"{server}/playground" + (f"#s={packed(state)}" if state else ""))
        if key:
            page.fill("#key", key)
            page.click("text=Use it")
            page.wait_for_selector(".token")
        return page

    yield visit
    for context in contexts:
        context.close()
    # The browser itself says so of every answer that is no success.
    told = re.compile(r"Failed to load resource: .* status of 40[01] ")
    assert not [error for error in errors if not told.match(error)]
    assert hosts <= {urlsplit(server).netloc}


def packed(state):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = deflate.compress(json.dumps(state).encode()) + deflate.flush()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw(text=PROMPT, *marked, **knobs):
    """A state with a raw prompt, each of these texts marked where it stands first."""
    units = text.encode("utf-16-le")  # JavaScript counts these, two bytes each
    starts = [units.index(words.encode("utf-16-le")) // 2 for words in marked]
    marks = [
        {"start": start, "end": start + len(words.encode("utf-16-le")) // 2, "alpha": 1}
        for start, words in zip(starts, marked, strict=True)
    ]
    return {"mode": "raw", "raw": {"text": text, "marks": marks}, "maxTokens": 5, **knobs}


def complete(server, emphasis=None, path="completions", **body):
    body = {"model": "m", "max_tokens": 5, "temperature": 0, **body}
    if emphasis:
        body["emphasis"] = emphasis
    answer = http.post(f"{server}/v1/{path}", json=body, headers=AUTH).json()["choices"][0]
    return answer["text"] if "text" in answer else answer["message"]["content"]


def run(page, kind="emphasised"):
    """Presses Run; the answer, once both are there."""
    before = page.locator("#runs .run").count()
    page.click("#run")
    page.locator("#runs .run").nth(before).wait_for()
    return answer(page, kind)


def answer(page, kind):
    return page.locator(f"#{kind} .answer").first.text_content()


def emphasised(page):
    """What is coloured in the prompt as the model sees it."""
    return "".join(page.locator("mark.token").all_text_contents())


def drag(page, words, after="", watch=lambda: None):
    """Selects these words of the only text with the mouse, as they stand on the screen.

    The first that stand there, or the first after these. ``watch`` is called on the way.
    """
    ends = page.evaluate(
        """([words, after]) => {
          const copy = document.querySelector(".copy");
          const start = copy.textContent.indexOf(after + words) + after.length;
          const at = (position) => {
            const walk = document.createTreeWalker(copy, NodeFilter.SHOW_TEXT);
            for (let node; (node = walk.nextNode()); position -= node.length) {
              if (position > node.length) continue;
              const range = document.createRange();
              range.setStart(node, position);
              const box = range.getBoundingClientRect();
              return [box.x, box.y + box.height / 2];
            }
          };
          return [at(start), at(start + words.length)];
        }""",
        [words, after],
    )
    page.mouse.move(*ends[0])
    page.mouse.down()
    for step in range(1, 5):
        page.mouse.move(*(a + (b - a) * step / 4 for a, b in zip(*ends, strict=True)))
        watch()
    page.mouse.up()


def test_headers(server):
    """The page needs no key, takes nothing from elsewhere; its routes below /v1 need one."""
    page = http.get(f"{server}/playground")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert not re.findall(r"""<script>|\son\w+=|style=|(?:src|href)=["']?\w+:""", page.text)
    for file in re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text):
        assert http.get(f"{server}/{file}").status_code == 200
    assert http.get(f"{server}/playground/../routes.py").status_code == 404
    assert http.get(f"{server}/playground/no.js").status_code == 404
    assert http.get(f"{server}/v1/emphasis/head_sets").status_code == 401
    assert http.get(f"{server}/v1/emphasis/head_sets", headers=AUTH).status_code == 200


def test_key(visit):
    """Asked for once, refused if wrong, and kept nowhere but in the page's memory."""
    page = visit(key=None)
    page.fill("#key", "wrong")
    page.click("text=Use it")
    page.wait_for_selector("#key-wrong:visible")
    page.click("text=Cancel")
    page.wait_for_selector("#prompt-error:visible")
    assert "API key" in page.inner_text("#prompt-error")
    page.click("#enter-key")
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(".token")
    page.focus("textarea")
    page.keyboard.type("Now. ")
    page.wait_for_selector(".token:has-text('Now')")
    assert not page.locator("#key-dialog[open]").count()
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage, document.cookie])")
    assert KEY not in kept + page.url + page.content()
    page.reload()
    page.wait_for_selector("#key-dialog[open]")


def test_mark_with_the_mouse(visit):
    page = visit(raw())
    drag(page, "citizen of Brazil")
    page.click("#mark")
    page.wait_for_selector("mark.token")
    assert emphasised(page) == " citizen of Brazil"
    assert page.inner_text(".marks q") == "citizen of Brazil"
    drag(page, "citizen of")  # the first place in the text
    page.click("#mark")
    page.locator(".marks li").nth(1).wait_for()
    drag(page, "citizen of")
    page.click("#mark")
    page.wait_for_selector(".marks li:nth-child(2)", state="detached")
    page.click(".marks button")
    page.wait_for_selector("mark.token", state="detached")


def test_mark_with_the_keyboard(visit):
    """Parts of a word: the whole tokens are shown. The mark follows the text that is typed."""
    page = visit(raw("Name a colour."))
    page.focus("textarea")
    page.keyboard.press("Control+Home")
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    for _ in range(3):
        page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Control+e")
    page.wait_for_selector("mark.token")
    assert page.inner_text(".marks q") == "col"
    assert emphasised(page) == " colour"
    assert "".join(page.locator(".copy mark").all_text_contents()).strip() == "colour"
    page.keyboard.press("Control+Home")
    page.keyboard.type("Please: ")
    page.wait_for_selector(".token:has-text('Please')")
    assert (page.inner_text(".marks q"), emphasised(page)) == ("col", " colour")
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Control+e")  # the whole word, of which a part was marked
    page.wait_for_selector("q:text-is('colour')")
    page.keyboard.press("Control+e")
    page.wait_for_selector(".marks li", state="detached")


def test_both_answers_and_the_knobs(visit, server):
    """The answers are the server's; α and a mark's strength change them at once."""
    page = visit(raw(PROMPT, FACT))
    plain, marked = complete(server, prompt=PROMPT), complete(server, FACT, prompt=PROMPT)
    assert plain != marked
    assert run(page) == marked
    assert answer(page, "plain") == plain
    assert [" " + w for w in page.locator("#emphasised .other").all_inner_texts()] == [" Brazil."]
    assert re.fullmatch(
        r"first token \d+ ms · [\d.]+ tokens/s · 5 tokens", page.inner_text("#emphasised .figures")
    )
    page.focus("#alpha")
    page.keyboard.press("End")
    page.locator("#runs .run").nth(1).wait_for()
    assert page.inner_text("#alpha-shown") == "1"
    assert answer(page, "emphasised") == answer(page, "plain") == plain
    page.select_option("#heads", "smollm2-135m-counterfact")  # its own α comes with it
    page.locator("#runs .run").nth(2).wait_for()
    assert page.inner_text("#alpha-shown") == "0.01"
    heads = {"text": FACT, "heads": "smollm2-135m-counterfact"}
    assert answer(page, "emphasised") == complete(server, heads, prompt=PROMPT)
    page.fill(".strength input", "-2")  # as weak as what is not marked
    page.locator("#runs .run").nth(3).wait_for()
    assert answer(page, "emphasised") == plain
    page.click("label:has([value=share])")  # which goes with marks of full strength alone
    page.wait_for_selector("#strength-error:visible")
    page.locator("#runs .run").nth(4).wait_for()
    page.fill(".strength input", "0")
    page.locator("#runs .run").nth(5).wait_for()
    shared = {"text": FACT, "heads": "smollm2-135m-counterfact", "share": 0.3}
    assert answer(page, "emphasised") == complete(server, shared, prompt=PROMPT)
    page.locator("#runs .run").nth(5).click()  # the first
    page.wait_for_selector("#heads-error", state="hidden")
    assert answer(page, "emphasised") == marked
    assert page.inner_text("#alpha-shown") == "0.01"


def test_chat(visit, server):
    """Turns of a conversation, a mark in one of them, and several samples."""
    page = visit({"mode": "chat", "messages": [{"role": "user", "text": QUESTION, "marks": []}]})
    drag(page, "Answer in JSON.")
    page.keyboard.press("Control+e")
    page.wait_for_selector("mark.token")
    assert "<|im_start|>user" in page.inner_text("#tokens")
    page.fill("#max-tokens", "12")
    messages = [{"role": "user", "content": QUESTION}]
    expected = [
        complete(server, e, "chat/completions", messages=messages, max_tokens=12)
        for e in (None, [{"message": 0, "text": "Answer in JSON."}])
    ]
    assert expected[0] != expected[1]
    assert run(page) == expected[1]
    assert answer(page, "plain") == expected[0]
    page.click("#add-message")
    assert page.locator(".message").count() == 3  # the answer, and the next turn
    assert page.locator("textarea").nth(1).input_value() == expected[1].strip()
    page.keyboard.type("Another.")
    page.uncheck("#again")
    page.fill("#temperature", "0.7")
    page.fill("#samples", "2")
    page.keyboard.press("Tab")
    run(page)
    assert page.locator("#emphasised .answer").count() == 2


def test_stop(visit):
    page = visit(raw(PROMPT, FACT, maxTokens=800))
    page.click("#run")
    page.wait_for_selector("#emphasised .answer")
    page.keyboard.press("Escape")
    page.wait_for_selector("#runs .run")
    assert "stopped" in page.inner_text("#emphasised .figures")
    page.wait_for_selector("#stop", state="hidden")


def test_refused_in_place(visit):
    """A mark that the server refuses, no heads, and a prompt that is too long."""
    page = visit(raw("Name\x1f a colour.", "\x1f", "colour"))
    page.wait_for_selector(".marks li.wrong .error")
    assert "expected text with words" in page.inner_text(".marks li.wrong .error")
    assert page.locator(".marks li.wrong").count() == 1
    page.click(".marks li.wrong button")
    page.wait_for_selector("mark.token")
    page.click("#grid-box summary")
    page.click("#no-heads")
    page.wait_for_selector("#heads-error:visible, #prompt-error:visible")
    page.click("[data-cell='20.3']")
    page.wait_for_selector("mark.token")
    assert page.inner_text("#head-count") == "1 of 270"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Space")
    assert page.inner_text("#head-count") == "2 of 270"
    page.click("[data-layer='21']")
    assert page.inner_text("#head-count") == "10 of 270"
    page.fill("textarea", "word " * 1100)
    page.click("#run")
    page.wait_for_selector("#plain .error")
    assert "1024" in page.inner_text("#plain .error")


def test_link_and_history(visit, server):
    """A link opens the same state, and runs nothing; a star outlasts the page."""
    page = visit(raw(PROMPT, FACT, alpha=0.02, heads={"20": [1, 2]}))
    run(page)
    page.click(".star")
    page.click("#link")
    page.wait_for_selector("#link:text-is('Copied')")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    assert link.startswith(f"{server}/playground#s=")
    other = visit(None)
    other.goto(link)
    other.reload()
    other.fill("#key", KEY)
    other.click("text=Use it")
    other.wait_for_selector("mark.token")
    assert other.input_value("textarea") == PROMPT
    assert emphasised(other).strip() == FACT
    assert other.inner_text("#alpha-shown") == "0.02"
    assert other.inner_text("#head-count") == "2 of 270"
    assert not other.locator("#runs .run").count()
    page.reload()
    page.fill("#key", KEY)
    page.click("text=Use it")
    page.click("#runs .run")
    assert answer(page, "emphasised")
    page = visit({"mode": 7, "raw": {"text": {}, "marks": [1]}, "messages": "no", "heads": [1]})
    assert page.locator(".message").count() == 1  # what makes no sense is left out


def test_take_it_with_you(visit, server):
    """The code sends exactly what was marked: both clients get the page's answer."""
    text = "It's Ann's \"day\". Ann lived in Rome. Ann lives in Oslo 🌍. Ann lives in"
    page = visit(raw(text, "Ann lives in Oslo 🌍"))
    expected = run(page)
    page.click("#copy")
    codes = {}
    for kind in ("curl", "openai", "python"):
        page.click(f"label:has([value={kind}])")
        codes[kind] = page.inner_text("#code")
    page.click("#copy-code")
    assert page.evaluate("navigator.clipboard.readText()") == codes["python"]
    env = {**os.environ, "VLLM_API_KEY": KEY}
    result = subprocess.run(
        ["bash", "-c", codes["curl"]], env=env, capture_output=True, check=True, text=True
    )
    assert json.loads(result.stdout)["choices"][0]["text"] == expected
    result = subprocess.run(
        [sys.executable, "-"], input=codes["openai"], env=env, capture_output=True, check=True,
        text=True,
    )  # fmt: skip
    assert result.stdout == expected + "\n"
    sent = json.loads(re.search(r"-d '(.*)'$", codes["curl"], re.DOTALL)[1].replace("'\\''", "'"))
    (params,) = [
        call for call in ast.walk(ast.parse(codes["python"]))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "SamplingParams"
    ]  # fmt: skip
    offline = {k.arg: ast.literal_eval(k.value) for k in params.keywords}
    heads = http.get(f"{server}/v1/emphasis/head_sets", headers=AUTH).json()["default"]["heads"]
    assert offline["extra"]["emphasis"] == {**sent["emphasis"], "heads": heads}
    assert KEY not in "".join(codes.values())


@pytest.mark.parametrize("strength", [{"alpha": 0.01}, {"share": 0.4}])
def test_attention(strength, server, smollm2, smollm2_oracle):
    """Mass on the marks of every steered head, and one head's weights, as the oracle has them."""
    heads = {20: [0, 4], 23: [3, 4, 7]}
    emphasis = {"text": [FACT], "heads": heads, **strength}
    resolved = look(server, emphasis, "resolve")["prompts"][0]
    (start, end) = resolved["emphasised"][0]["tokens"]
    ids = smollm2_ids(smollm2, PROMPT)
    steering = Steering([(start, end)], heads, strength.get("alpha", 0), len(ids))
    steering.share = strength.get("share")
    truth = {
        "plain": last_row(smollm2_oracle, ids, None),
        "emphasised": last_row(smollm2_oracle, ids, steering),
    }
    seen = look(server, emphasis, "attention?layer=23&head=4")
    assert {(of["layer"], of["head"]) for of in seen["heads"]} == {
        (layer, head) for layer, of in heads.items() for head in of
    }
    for kind, weights in truth.items():
        for of in seen["heads"]:
            mass = float(weights[of["layer"]][of["head"]][start:end].sum())
            assert of[kind] == pytest.approx(mass, abs=2e-4), (of, kind)
        assert seen["map"][kind] == pytest.approx(weights[23][4].tolist(), abs=2e-4)
    best = max(seen["heads"], key=lambda of: of["emphasised"] - of["plain"])
    assert best["emphasised"] > best["plain"] + 0.2
    most = look(server, emphasis, "attention")
    assert (most["layer"], most["head"]) == (best["layer"], best["head"])


def test_attention_is_limited(server):
    """One prompt at a time; only what can be looked into, and only with the key."""
    for wrong in ("?layer=99&head=0", "?layer=x&head=0"):
        assert "error" in look(server, FACT, "attention" + wrong, status=400)
    look(server, None, "attention", status=400)
    assert http.post(f"{server}/v1/emphasis/attention", json={}).status_code == 401
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(look, server, FACT, "attention", status=None) for _ in range(4)]
        codes = [code for code, _ in (future.result() for future in asked)]
    assert set(codes) == {200, 429}


def look(server, emphasis, path, status=200):
    body = {"model": "m", "prompt": PROMPT, "emphasis": emphasis}
    answer = http.post(f"{server}/v1/emphasis/{path}", json=body, headers=AUTH)
    if status is None:
        return answer.status_code, answer.json()
    assert answer.status_code == status, answer.text
    return answer.json()


def smollm2_ids(path, text):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)(text).input_ids


def test_look_inside(visit):
    page = visit(raw(PROMPT, FACT))
    page.click("#look")
    page.wait_for_selector("#inside:visible")
    plain, marked = map(float, re.findall(r"([\d.]+) %", page.inner_text("#inside-said")))
    assert plain < marked
    assert page.locator("#map-emphasised .heat").count() == page.locator(".token").count()
    page.locator("#inside-heads button").nth(3).click()
    page.wait_for_selector("#inside-heads li:nth-child(4) [aria-pressed=true]")
    page.fill("textarea", "Another prompt")
    page.wait_for_selector("#inside", state="hidden")


def test_phone(visit):
    """Nothing is wider than the screen, and Run is in reach."""
    page = visit(raw(PROMPT, FACT), has_touch=True)
    page.set_viewport_size({"width": 360, "height": 740})
    page.click("#grid-box summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    run(page)
    box = page.locator("#run").bounding_box()
    assert box["y"] + box["height"] <= 740
    page.click("#copy")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible(scheme, visit):
    """axe-core finds nothing, with everything on the screen."""
    from axe_playwright_python.sync_playwright import Axe

    page = visit(raw(PROMPT, FACT, heads="smollm2-135m-counterfact"), color_scheme=scheme)
    run(page)
    page.click("#grid-box summary")
    page.click("#look")
    page.wait_for_selector("#inside:visible")
    found = Axe().run(page)
    page.click("#copy")
    dialog = Axe().run(page)
    violations = found.response["violations"] + dialog.response["violations"]
    assert not [(v["id"], v["impact"], [n["html"] for n in v["nodes"]]) for v in violations]


def test_picture(visit, tmp_path):
    """The picture of the README: the page as it opens, after Run. SCREENSHOT=1 writes it anew."""
    page = visit()
    run(page)
    assert answer(page, "plain") != answer(page, "emphasised")
    page.click("#look")
    page.wait_for_selector("#inside:visible")
    page.evaluate("document.activeElement.blur()")
    path = pictures(tmp_path) / "playground.png"
    page.screenshot(path=path)
    assert path.stat().st_size < 200_000


def test_film(visit, tmp_path):
    """The moving picture of docs/playground.md: words are marked, both answers stream, and where
    the attention goes. SCREENSHOT=1 writes it anew."""
    page = visit(raw(maxTokens=10))
    page.set_viewport_size({"width": 1000, "height": 760})
    frames, seconds = [], []

    def show(for_seconds):
        frames.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
        seconds.append(for_seconds)

    show(1.5)
    drag(page, FACT, after="Currently, ", watch=lambda: show(0.3))
    page.click("#mark")
    page.wait_for_selector("mark.token")
    show(2)
    page.click("#run")
    while not page.locator("#runs .run").count() and len(frames) < 60:
        show(0.25)
    show(4)
    assert emphasised(page) == " " + FACT
    assert answer(page, "plain") != answer(page, "emphasised")
    page.click("#look")
    page.wait_for_selector("#inside:visible")
    page.locator("#inside").scroll_into_view_if_needed()
    show(5)
    path = pictures(tmp_path) / "playground.webp"
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=[int(1000 * s) for s in seconds],
        loop=0, quality=60, method=6,
    )  # fmt: skip
    assert path.stat().st_size < 500_000
    assert 12 < sum(seconds) < 30


def pictures(otherwise):
    """The folder of the pictures: that of the documents where they are to be written anew."""
    return PICTURES if os.environ.get("SCREENSHOT") else otherwise
