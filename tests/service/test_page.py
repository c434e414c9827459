"""The server's page in a real browser: signing in, a job with its report, two results, the form; by keyboard too."""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from serving import OTHER_TOKEN, TOKEN, Serving, run_config_of

from layerlens.exceptions import ServiceError
from layerlens.service.client import Client

ROOT = Path(__file__).parents[2]
LONG_MS = 60_000


def checks() -> ModuleType:
    found = spec_from_file_location("report_checks", ROOT / "scripts/report_checks.py")
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = checks().find_chromium()
    if chromium is None:
        pytest.skip("no Chromium to open the page in: apt-get install chromium, or set CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        opened = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield opened
        opened.close()


class Opened:
    """The page in a fresh profile, with all that it said and asked for."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(LONG_MS)
        self.said: list[str] = []
        self.asked: list[Any] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request))
        self.page.goto(f"{address}/")

    def picture(self, name: str) -> None:
        """What is seen, for whoever asks with LAYERLENS_PICTURES=FOLDER."""
        if folder := os.environ.get("LAYERLENS_PICTURES"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
            for frame in self.page.query_selector_all("iframe")[:1]:
                frame.scroll_into_view_if_needed()
                self.page.screenshot(path=Path(folder) / f"{name}-frame.png")

    def sign_in(self, token: str = TOKEN) -> None:
        self.page.get_by_label("Token", exact=True).fill(token)
        self.page.keyboard.press("Enter")

    def violations(self) -> list[str]:
        from axe_playwright_python.sync_playwright import Axe

        module = checks()
        options = {"runOnly": module.RULES, "iframes": False}
        return [module.violation(found) for found in Axe().run(self.page, options=options).response["violations"]]


def header(server: Serving, path: str) -> dict[str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=600)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        return {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


def test_the_policy_of_the_page_and_of_its_frame(server: Serving) -> None:
    for path in ("/", "/report-frame"):
        found = header(server, path)
        policy = found["content-security-policy"]
        assert "default-src 'none'" in policy
        assert not re.search(r"script-src[^;]*unsafe|https?:|\*", policy)
        assert (found["referrer-policy"], found["cache-control"]) == ("no-referrer", "no-store")
    assert policy.startswith("sandbox allow-scripts;")
    assert "connect-src" not in policy
    assert "frame-ancestors 'none'" in header(server, "/")["content-security-policy"]


def test_without_the_right_token_nothing_is_shown(browser: Any, server: Serving, finished_run: dict[str, Any]) -> None:
    opened = Opened(browser, server.address)
    page = opened.page
    page.get_by_role("heading", name="Sign in").wait_for()
    assert opened.violations() == []
    opened.sign_in(OTHER_TOKEN)
    page.get_by_text("The server does not know this token").wait_for()
    field = page.get_by_label("Token", exact=True)
    assert (field.get_attribute("aria-invalid"), field.evaluate("e => e === document.activeElement")) == ("true", True)
    assert not page.get_by_role("heading", name="Jobs").is_visible()
    assert finished_run["id"] not in page.content()
    opened.context.close()


def test_a_job_its_report_and_the_token(browser: Any, server: Serving, finished_run: dict[str, Any]) -> None:
    opened = Opened(browser, server.address, viewport={"width": 390, "height": 800})
    page = opened.page
    opened.sign_in()
    number = finished_run["number"]
    shown = page.get_by_role("button", name=f"Show job {number}", exact=True)
    shown.focus()  # by keyboard alone
    page.keyboard.press("Enter")
    frame = page.frame_locator(f"iframe[title='Report of job {number}']")
    frame.get_by_role("heading", name="Layers").wait_for()
    frame.get_by_role("button", name="Score", exact=True).click()  # the report's own script runs
    assert frame.locator("th[aria-sort=descending]").count() == 1
    assert page.get_by_role("heading", name=f"Job {number}").is_visible()
    assert page.locator("#stages li").count() >= 4
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert opened.violations() == []
    opened.picture("page-phone")

    # The report has an origin of its own: it reaches neither the page, nor its storage, nor the server.
    inside = next(each for each in page.frames if each.url.endswith("/report-frame"))
    for reached in ("parent.document", "parent.sessionStorage", "sessionStorage", "document.cookie"):
        assert inside.evaluate(f"() => {{ try {{ {reached}; return '' }} catch (error) {{ return error.name }} }}"), (
            reached
        )
    refused = inside.evaluate("url => fetch(url).then(() => '', error => error.name)", f"{server.address}/healthz")
    assert refused == "TypeError"
    expected = ("401", "Content Security Policy", "Fetch")  # before signing in, and what was tried just now
    assert [text for text in opened.said if not any(words in text for words in expected)] == []

    # The token is in headers to this server, and nowhere else.
    assert all(request.url.startswith(server.address) and TOKEN not in request.url for request in opened.asked)
    assert TOKEN not in page.content()
    assert page.evaluate("() => [sessionStorage.length, localStorage.length]") == [0, 0]
    page.reload()
    page.get_by_role("heading", name="Sign in").wait_for()
    page.get_by_label("Keep it until I close this tab").check()
    opened.sign_in()
    shown.wait_for()
    page.reload()
    shown.wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("heading", name="Sign in").wait_for()
    assert page.evaluate("() => sessionStorage.length") == 0
    opened.context.close()


def test_submitting_following_comparing_and_cancelling(
    browser: Any, server: Serving, client: Client, finished_run: dict[str, Any]
) -> None:
    opened = Opened(browser, server.address, color_scheme="dark")
    page = opened.page
    opened.sign_in()
    submit = page.get_by_role("button", name="Submit", exact=True)
    submit.click()
    for words in ("Name the model to use", "Name the data to use", "Give at least one budget"):
        assert page.get_by_text(words).is_visible()
    model = page.get_by_label("Model", exact=True)
    assert model.evaluate("e => e === document.activeElement")
    model.fill("/etc/passwd")
    page.get_by_label("Data", exact=True).fill("reviews.jsonl")
    page.get_by_label("Trainable parameters").fill("many")
    submit.click()
    assert page.get_by_text("Write a number such as 300k").is_visible()
    page.get_by_label("Trainable parameters").fill("1.2k")
    submit.click()
    page.locator("#model-error", has_text="model.name_or_path").wait_for()  # the server's own words, at the field
    assert model.get_attribute("aria-invalid") == "true"
    opened.picture("page-form")
    assert opened.violations() == []

    # Choosing again from what a run measured: the form gives the budget alone. Its stages are seen as they come.
    page.get_by_role("button", name=f"Choose again from job {finished_run['number']}", exact=True).click()
    page.get_by_label("Trainable parameters").fill("600")
    submit.click()
    page.get_by_role("status").filter(has_text="was submitted").wait_for()
    page.locator("#job-state", has_text="optimize of model on reviews.jsonl: succeeded").wait_for()
    stages = page.locator("#stages li").all_inner_texts()
    assert any(re.fullmatch(r"solve: ended, [\d.]+ s", text) for text in stages), stages
    again = client.jobs()[0]
    assert client.result(again["id"])["resources"][0]["budget"] == 600

    # Two results side by side.
    for job in (finished_run, again):
        page.get_by_role("checkbox", name=f"Compare job {job['number']}", exact=True).check()
    page.get_by_role("button", name="Compare the two chosen").click()
    page.locator("#differences-note", has_text="layers differ").wait_for()
    figures = page.locator("#figures").inner_text()
    assert re.search(r"trainable parameters\s+[\d,]+ of 1,500\s+\d+ of 600", figures), figures
    for place in (0, 1):
        report = page.frame_locator(f"#two-reports iframe >> nth={place}")
        report.get_by_role("heading", name="Layers").wait_for()
    opened.picture("page-two")
    assert opened.violations() == []
    assert [text for text in opened.said if "422" not in text and "401" not in text] == []

    # A whole configuration goes as it is; the job is cancelled from the list.
    page.get_by_text("Write the whole configuration instead").click()
    page.get_by_role("button", name="Measure a model instead").click()
    page.get_by_label("Configuration (YAML)").fill(json.dumps(run_config_of(max_trainable_params=900)))
    submit.click()
    page.get_by_role("status").filter(has_text=f"Job {again['number'] + 1} was submitted").wait_for()
    cancel = page.get_by_role("button", name=f"Cancel job {again['number'] + 1}", exact=True)
    cancel.click()
    newest = client.jobs()[0]
    assert (newest["kind"], newest["model"], newest["data"]) == ("run", "model", "reviews.jsonl")
    assert client.wait(newest["id"])["state"] == "cancelled"
    page.locator(f"tr[data-id='{newest['id']}']").get_by_text("cancelled").wait_for()

    # Removing asks first, and takes the row and the job away.
    answers = iter(("dismiss", "accept"))
    page.on("dialog", lambda dialog: getattr(dialog, next(answers))())
    remove = page.get_by_role("button", name=f"Remove job {newest['number']}", exact=True)
    remove.click()
    assert client.job(newest["id"])["state"] == "cancelled"
    remove.click()
    page.get_by_role("status").filter(has_text=f"Job {newest['number']} was removed").wait_for()
    page.locator(f"tr[data-id='{newest['id']}']").wait_for(state="detached")
    with pytest.raises(ServiceError):
        client.job(newest["id"])
    opened.context.close()

    # With a few jobs to a page in place of fifty, older ones are asked for, and stay when the list comes again.
    numbers = [job["number"] for job in client.jobs()]
    size = max(1, len(numbers) // 3)
    opened = Opened(browser, server.address)
    page = opened.page
    small = re.compile(r"/v1/jobs\?limit=50")
    page.route(small, lambda route: route.continue_(url=route.request.url.replace("limit=50", f"limit={size}")))
    opened.sign_in()
    rows, older = page.locator("#jobs tbody tr"), page.get_by_role("button", name="Older jobs")
    for count in range(size, len(numbers), size):
        rows.nth(count - 1).wait_for()
        assert rows.count() == count
        older.click()
        rows.nth(count).wait_for()
    older.wait_for(state="hidden")
    for _ in range(2):  # the list comes again
        with page.expect_response(re.compile(r"/v1/jobs\?limit=")):
            pass
    shown = rows.get_by_role("button", name="Show job")
    assert shown.all_inner_texts() == [f"Job {number}" for number in numbers]
    opened.context.close()
