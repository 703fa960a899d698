"""The page in a real Chromium, before the stand-in for Ollama; skipped where there is none.

`python -m tests.test_browser` makes the picture in the README.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

import demo
from kernel.config import HOME
from tests.support import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    PATHS,
    House,
    chat,
    done,
    line,
    running,
    write_agent,
)

pytest.importorskip("playwright.async_api", reason="needs the package playwright")

from playwright.async_api import Browser, Page, Request, async_playwright, expect

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BINARY = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(not BINARY, reason=f"needs one of {BROWSERS}")

PICTURE = HOME / "docs" / "osp.png"
HOSTILE = "<img src=x onerror=alert(1)>"
TURNED = "\u202egnp.exe"
TAG = "class It(BaseAgent):\n    async def on_request(self, payload):\n"
TAG += "        return set_prompt(payload, prompt(payload) + ' <tagged')"
BROKEN = f"class It(BaseAgent):\n    def setup(self):\n        raise ValueError({HOSTILE!r})"
WIDER = """[document.documentElement, ...document.querySelectorAll("section")]
    .filter(part => part.scrollWidth > part.clientWidth).map(part => part.textContent)"""
TURNS = "window.away = {}; document.dispatchEvent(new Event('visibilitychange'))"
TEXTS: dict[str, Any] = {"page": {"bodies": True}}


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        yield await playwright.chromium.launch(executable_path=BINARY)


@pytest.fixture(scope="module")
async def slow_url() -> AsyncIterator[str]:
    """A stand-in for Ollama that takes its time."""
    async with demo.serve(demo.create_app(0.02)) as url:
        yield url


@pytest.fixture
def agents(plugins: Path) -> Path:
    write_agent(plugins, "tag", TAG, description=f"Tags {HOSTILE}")
    write_agent(plugins, "broken", BROKEN)
    return plugins


@pytest.fixture
async def client(slow_url: str, agents: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a proxy that keeps texts."""
    async with running(slow_url, agents, **TEXTS) as client:
        yield client


@asynccontextmanager
async def opened(
    browser: Browser, client: httpx.AsyncClient, *fine: str, **options: Any
) -> AsyncIterator[Page]:
    """Open the page; fail if it asks anyone else, or if the console says more than `fine`."""
    wrong: list[str] = []
    own = str(client.base_url)

    def check(asked: Request) -> None:
        if not asked.url.startswith(f"{own}/"):
            wrong.append(asked.url)

    async with await browser.new_context(**options) as context:
        page = await context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", check)
        await page.goto(f"{own}/osp")
        yield page
    assert [text for text in wrong if not any(part in text for part in fine)] == []


async def ask(client: httpx.AsyncClient, text: str, path: str = CHAT, **fields: Any) -> None:
    headers = {"user-agent": fields.pop("agent", "curl/8")}
    await client.post(path, json=chat(path, text, **fields), headers=headers)


async def test_it_tells_the_truth_about_ollama_its_models_and_the_agents(
    browser: Browser, client: httpx.AsyncClient, slow_url: str
) -> None:
    async with opened(browser, client) as page:
        await expect(page.locator("#truth")).to_have_text(
            f"Ollama 0.33.0-demo answers at {slow_url}"
        )
        await expect(page.locator("#broken")).to_have_text("failed: broken")
        await expect(page.locator("#models tbody tr").first).to_contain_text("demo:latest4,096")
        await expect(page.locator("#agents tbody tr").first).to_contain_text("broken failed")
        await expect(page.locator("#agents pre")).to_have_text(HOSTILE)
        await expect(page.locator("#agents tbody tr").last).to_contain_text("tag")


async def test_a_running_stream_is_shown_and_stopped(
    browser: Browser, client: httpx.AsyncClient
) -> None:
    task = asyncio.create_task(ask(client, "word " * 2000))
    async with opened(browser, client) as page:
        row = page.locator("#running tbody tr")
        await expect(row).to_contain_text("streaming")
        await expect(page.locator("#count")).to_have_text(" · 1 running")
        await expect(row.locator("td").nth(3)).to_have_text(re.compile(r"~\d+"))
        await row.get_by_role("button").click()

        await expect(page.locator("#idle")).to_be_visible()
        await expect(page.locator("#latest .line td").nth(4)).to_have_text("200, stopped")
    with pytest.raises(httpx.RemoteProtocolError):
        await task


async def test_filters_keep_what_matches(browser: Browser, client: httpx.AsyncClient) -> None:
    await ask(client, "/tag x", model="demo")
    await ask(client, "x", model="missing")
    async with opened(browser, client) as page:
        models = page.locator("#latest .line td:nth-child(2)")
        await expect(models).to_have_text(["missing", "demo"])
        for name, value, shown in [
            ("text", "CURL", ["missing", "demo"]),
            ("model", "miss", ["missing"]),
            ("agent", "tag", ["demo"]),
            ("text", "/v1/", []),
        ]:
            await page.locator(f"#filter [name={name}]").fill(value)
            await expect(models).to_have_text(shown)
            await page.locator(f"#filter [name={name}]").fill("")
        await page.locator("#filter [name=status]").select_option("!")
        await expect(models).to_have_text(["missing"])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_prompt_is_explained_and_sent_in_every_dialect(
    browser: Browser, client: httpx.AsyncClient, path: str, streamed: bool
) -> None:
    async with opened(browser, client) as page:
        await expect(page.locator("#try [name=model] option")).to_have_count(2)
        await page.locator("#try [name=dialect]").select_option(path[1:])
        await page.locator("#try [name=stream]").set_checked(streamed)
        await page.locator("#try textarea").fill("/tag it's")
        await page.get_by_role("button", name="Explain").click()
        await expect(page.locator("#answer")).to_contain_text("+ [user] it's <tagged")
        await expect(page.locator("#curl")).to_contain_text("/explain /tag it'\\''s")

        await page.get_by_role("button", name="Send").click()
        sent = "I am the demo model. I was sent:\n[user] it's <tagged"
        await expect(page.locator("#answer")).to_have_text(sent)
        await expect(page.locator("#progress")).to_have_text(re.compile("^done, "))
        command = await page.locator("#curl").inner_text()
    run = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE)
    said, _ = await run.communicate()

    assert b"it's" in said and b"tagged" in said


async def test_what_goes_wrong_with_a_prompt_is_said_and_a_stream_can_be_left(
    browser: Browser, client: httpx.AsyncClient
) -> None:
    async with opened(browser, client, "404") as page:
        await page.locator("#try [name=model] option").first.evaluate("it => it.value = 'gone'")
        await page.locator("#try textarea").fill("x")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#progress")).to_have_text("404: model 'gone' not found")

        await page.locator("#try [name=model]").select_option("demo-embed:latest")
        await page.locator("#try [name=model] option").last.evaluate("it => it.value = 'demo'")
        await page.locator("#try textarea").fill("word " * 2000)
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#answer")).to_contain_text("word")
        await page.locator("#leave").click()
        await expect(page.locator("#progress")).to_have_text("stopped")
        await expect(page.locator("#latest")).to_contain_text("200, client closed")


async def test_one_request_shows_what_each_agent_changed(
    browser: Browser, client: httpx.AsyncClient
) -> None:
    await ask(client, "/tag hello")
    async with opened(browser, client) as page:
        await page.locator("#latest .line").click()
        detail = page.locator(".detail")
        await expect(detail.locator(".two pre")).to_have_text(
            [re.compile(r"^\[user\] hello\n"), re.compile(r"^\[user\] hello <tagged\n")]
        )
        await expect(detail).to_contain_text("POST /api/chat")
        await expect(detail).to_contain_text("I am the demo model. I was sent:")
        await expect(detail.locator("pre").last).to_have_text(re.compile(r"^curl http://"))
        await page.locator("#latest .line").click()
        await expect(detail).to_have_count(0)


async def test_a_full_context_and_a_hint_are_marked_and_their_cure_is_told(
    browser: Browser, house: House
) -> None:
    house.write("tag", TAG)
    house.ollama.memory = {"models": [{"model": "demo:latest", "context_length": 64}]}
    house.ollama.answers(line("y"), done(prompt_eval_count=64))
    async with house.open() as client, opened(browser, client) as page:
        await ask(client, "/tga x", agent="first")
        await ask(client, "x", agent="second")
        status = page.locator("#latest .line td:nth-child(5)")
        await expect(status).to_have_text(["200, full context", "200, full context"])
        await page.locator("#latest .line").last.click()
        await expect(page.locator(".detail")).to_contain_text("did you mean /tag?")
        cure = '[presets.large]\nmodel = "demo"\noptions = { num_ctx = 16384 }'
        await expect(page.locator(".detail pre").first).to_have_text(cure)
        house.ollama.answers(line("y"), done(prompt_eval_count=1))
        await ask(client, "/tga x")
        await expect(status.first).to_have_text("200, hint")


async def test_curves_are_drawn_of_the_latest_requests(
    browser: Browser, client: httpx.AsyncClient
) -> None:
    await ask(client, "x")
    async with opened(browser, client) as page:
        await expect(page.locator("figcaption")).to_have_text(
            [
                re.compile(r"^tokens/s(\d+)at most \1$"),
                re.compile(r"^first byte(\d+ ms)at most \1$"),
                "requests a minute6at most 6",
            ]
        )
        for drawn in await page.locator("polyline").all():
            await expect(drawn).to_have_attribute("points", re.compile(r"^0,[\d.]+ .*100,2$"))


async def test_hostile_texts_stay_texts(browser: Browser, client: httpx.AsyncClient) -> None:
    await ask(client, f"/tag {HOSTILE} {TURNED} {'x' * 3000}", agent=HOSTILE)
    await ask(client, "x", model=f"{HOSTILE}{TURNED}{'y' * 300}")
    async with opened(browser, client, viewport={"width": 360, "height": 800}) as page:
        await expect(page.locator("#agents pre")).to_have_text(HOSTILE)
        lines = page.locator("#latest .line")
        await expect(lines.first).to_contain_text(f"{HOSTILE}⟨U+202E⟩gnp.exe")
        for row in [lines.first, lines.last]:
            await row.click()
        await expect(page.locator(".detail .two pre").last).to_contain_text("⟨U+202E⟩gnp.exe xxx")
        await page.locator("#filter [name=text]").fill(HOSTILE)
        await page.locator("#try textarea").fill(f"{HOSTILE}{TURNED}")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator("#answer")).to_contain_text(f"{HOSTILE}⟨U+202E⟩")
        await expect(page.locator("#curl")).to_contain_text(f"{HOSTILE}\\u202E")

        assert await page.locator("img").count() == 0
        assert TURNED not in await page.locator("body").inner_text()
        assert await page.evaluate(WIDER) == []


async def test_without_script_the_table_is_there_and_nothing_that_would_need_it(
    browser: Browser, client: httpx.AsyncClient
) -> None:
    await ask(client, "x", agent=HOSTILE)
    async with opened(browser, client, java_script_enabled=False) as page:
        await expect(page.locator("#latest tbody tr")).to_have_count(1)
        await expect(page.locator("#latest tbody tr")).to_contain_text(HOSTILE)
        for hidden in ("#truth", "#curves", "#running", "#filter", "#try", "#key"):
            await expect(page.locator(hidden)).to_be_hidden()


async def test_the_keyboard_opens_and_closes_a_request(
    browser: Browser, client: httpx.AsyncClient
) -> None:
    await ask(client, "x")
    async with opened(browser, client) as page:
        time = page.locator("#latest .open")
        await expect(time).to_have_attribute("aria-expanded", "false")
        await page.locator("#filter [name=status]").focus()
        await page.keyboard.press("Tab")
        await expect(time).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator(".detail")).to_contain_text("POST /api/chat")
        await expect(time).to_have_attribute("aria-expanded", "true")
        await ask(client, "x")
        await expect(page.locator("#latest .line")).to_have_count(2)
        await expect(time.last).to_be_focused()  # while the list grows
        await page.keyboard.press("Enter")
        await expect(page.locator(".detail")).to_have_count(0)


async def test_a_key_is_asked_for_sent_and_kept_for_this_tab_alone(
    browser: Browser, slow_url: str, agents: Path
) -> None:
    keys: dict[str, Any] = {"keys": {"me": {"key": "sesame"}}}
    async with running(slow_url, agents, **keys) as client, opened(browser, client, "401") as page:
        for key, answer in [("wrong", "The proxy does not accept this key."), ("sesame", "Ollama")]:
            await page.get_by_label("This proxy needs a key").fill(key)
            await page.keyboard.press("Enter")
            await expect(page.locator("#truth")).to_contain_text(answer)
        await expect(page.locator("#key")).to_be_hidden()
        await page.reload()
        await expect(page.locator("#truth")).to_contain_text("Ollama")
        stores = "[sessionStorage['osp-key'], localStorage.length, document.cookie, location.href]"
        kept = await page.evaluate(stores)

    assert kept == ["sesame", 0, "", f"{client.base_url}/osp"]


async def test_a_proxy_that_is_gone_is_told_and_found_again(
    browser: Browser, slow_url: str, agents: Path
) -> None:
    async with AsyncExitStack() as closing:
        async with running(slow_url, agents) as client:
            page = await closing.enter_async_context(opened(browser, client, "ERR_CONNECTION"))
            await expect(page.locator("#truth")).to_contain_text("Ollama 0.33.0-demo")
        await expect(page.locator("#truth")).to_contain_text("does not answer. Trying again.")
        async with running(slow_url, agents, port=client.base_url.port or 0) as client:
            await ask(client, "x")
            await expect(page.locator("#truth")).to_contain_text("Ollama 0.33.0-demo")
            await expect(page.locator("#latest .line")).to_have_count(1)
            await closing.aclose()


async def test_it_rests_while_it_is_hidden(browser: Browser, client: httpx.AsyncClient) -> None:
    asked: list[str] = []
    async with opened(browser, client) as page:
        await expect(page.locator("#truth")).to_contain_text("Ollama")
        await page.clock.install()
        await page.evaluate("Object.defineProperty(document, 'hidden', {get: () => away})")
        await page.evaluate(TURNS.format("true"))
        page.on("request", lambda request: asked.append(request.url))
        await page.clock.run_for(60_000)
        assert asked == []
        async with page.expect_response("**/traces"):
            await page.evaluate(TURNS.format("false"))


@pytest.mark.parametrize(("scheme", "light"), [("light", True), ("dark", False)])
async def test_it_is_as_light_or_dark_as_the_system(
    browser: Browser, client: httpx.AsyncClient, scheme: Any, light: bool
) -> None:
    async with opened(browser, client, color_scheme=scheme) as page:
        color = await page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert (sum(map(int, re.findall(r"\d+", color))) > 600) is light


async def test_what_the_page_asks_for_itself_leaves_no_trace(
    browser: Browser, client: httpx.AsyncClient
) -> None:
    async with opened(browser, client) as page:
        await expect(page.locator("#models tbody")).to_contain_text("demo")
        await expect(page.locator("#none")).to_be_visible()

    assert (await client.get("/traces")).json()["finished"] == []


async def picture(browser: Browser, upstream: str, plugins: Path, file: Path) -> None:
    """Draw the page after a few requests."""
    view: Any = {"viewport": {"width": 960, "height": 900}, "color_scheme": "light"}
    async with running(upstream, plugins, **TEXTS) as client:
        await ask(client, "hello", model="llama", agent="curl/8")
        await ask(client, "/rag:k=1 what did we decide in May?", agent="OpenWebUI/0.6")
        await asyncio.gather(
            ask(client, "/time what day is it?", COMPLETIONS, stream=True, agent="openai-python/2"),
            ask(client, "/tarnslate:de good night", agent="ollama/0.33"),
            ask(client, "/translate:de good night", MESSAGES, stream=True, agent="claude-cli/2"),
        )
        long = asyncio.create_task(ask(client, "/time " + "why? " * 999, agent="OpenWebUI/0.6"))
        async with opened(browser, client, **view) as page:
            await expect(page.locator("#running tbody")).to_contain_text("streaming")
            await page.locator("#latest .line", has_text="rag").click()
            await expect(page.locator(".detail .two pre").last).to_contain_text("decisions.md")
            await page.screenshot(path=file)
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)


async def test_the_picture_in_the_readme_can_be_made(
    browser: Browser, slow_url: str, tmp_path: Path
) -> None:
    await picture(browser, slow_url, HOME / "plugins", tmp_path / "osp.png")

    for file in (tmp_path / "osp.png", PICTURE):
        data = file.read_bytes()
        assert data[:4] == b"\x89PNG" and len(data) < 150_000
        assert int.from_bytes(data[16:20]) == 960
    assert "docs/osp.png" in (HOME / "README.md").read_text(encoding="utf-8")


async def main() -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    async with demo.serve(demo.create_app(0.02)) as url, async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=BINARY)
        await picture(browser, url, HOME / "plugins", PICTURE)


if __name__ == "__main__":
    asyncio.run(main())
