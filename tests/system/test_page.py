"""The page as people meet it: Debian's Chromium before the real service, which stands behind a prefix and asks for a token."""

import base64
import io
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
from conftest import RunningService, require_program
from page_checks import assert_fits, assert_readable_by_everybody
from phantom_films import VISITS, assert_problem, dicom
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from pydicom.uid import generate_uid

from serve.store import Role, Store

pytestmark = [pytest.mark.system, pytest.mark.ray]
# A machine that does other work takes its time.
expect.set_options(timeout=30_000)

# What the service may go on letting in a token that was revoked, and a page until it asks again, with time to spare.
REVOKED_SECONDS = 30
EVIL = {"Sec-Fetch-Site": "cross-site"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = require_program("chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def store(guarded_service: RunningService) -> Iterator[Store]:
    with closing(Store(guarded_service.store)) as opened:
        yield opened


@pytest.fixture(scope="module")
def http(guarded_service: RunningService) -> Iterator[httpx.Client]:
    bearer = {"Authorization": f"Bearer {guarded_service.token}"}
    with httpx.Client(base_url=guarded_service.url, headers=bearer, timeout=60, trust_env=False) as client:
        yield client


@dataclass(frozen=True)
class Kept:
    """A study that the service has answered."""

    study: str
    patient: str


@pytest.fixture(scope="module")
def keep(http: httpx.Client) -> Callable[..., Kept]:
    def send(number: int = 0, status: int = 200, **elements: object) -> Kept:
        own: dict[str, object] = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")}
        own |= {"PatientID": f"MRN-{secrets.randbelow(10**9)}", "AccessionNumber": "ACC-4711"} | elements
        answer = http.post("/v1/instances", files={"image": dicom(VISITS[number], **own)})
        assert answer.status_code == status, answer.text
        return Kept(str(own["StudyInstanceUID"]), str(own["PatientID"]))

    return send


@pytest.fixture(scope="module")
def kept(keep: Callable[..., Kept]) -> Kept:
    return keep()


class Visitor:
    """Somebody at a browser of their own, and what the browser complained of."""

    def __init__(self, browser: Browser, url: str, **options: object) -> None:
        self.context: BrowserContext = browser.new_context(**options)
        self.url, self.complaints, self.addresses = url, [], []
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.addresses.append(request.url))

    def open(self, path: str = "/") -> Page:
        self.page.goto(self.url + path)
        return self.page

    def sign_in(self, token: str, path: str = "/") -> Page:
        self.open(path)
        self.page.get_by_label("Token").fill(token)
        self.page.get_by_role("button", name="Sign in").click()
        if path == "/" and self.page.get_by_role("button", name="Sign in").count() == 0:
            # The script is the last to arrive, and only then does the list do what is asked of it.
            expect(self.page.locator("#freshness")).to_contain_text("Up to date")
        return self.page

    def assert_content(self) -> None:
        """No violation of the content security policy, no error of a script, no file that is missing."""
        refused = re.compile(r"Failed to load resource.* 401 ")
        assert [text for text in self.complaints if not refused.search(text)] == []


@pytest.fixture
def visit(browser: Browser, guarded_service: RunningService) -> Iterator[Callable[..., Visitor]]:
    visitors = []

    def arrive(url: str = guarded_service.url, **options: object) -> Visitor:
        visitors.append(Visitor(browser, url, **options))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.assert_content()
        visitor.context.close()


@pytest.fixture
def token(store: Store) -> Callable[[Role], tuple[str, str]]:
    """The name and secret of a new token."""

    def make(role: Role) -> tuple[str, str]:
        name = f"{role} {secrets.token_hex(4)}"
        return name, store.add_token(name, role)

    return make


@pytest.fixture
def reading(visit: Callable[..., Visitor], guarded_service: RunningService, kept: Kept) -> Page:
    """The study, with its film drawn, before somebody who may do everything."""
    return opened(visit().sign_in(guarded_service.token, f"/studies/{kept.study}"))


def opened(page: Page) -> Page:
    expect(page.locator("#viewer")).to_have_attribute("data-loaded", "true")
    return page


def row_of(page: Page, study: str) -> Locator:
    return page.locator(f'tr[data-study="{study}"]')


def pixels(page: Page) -> np.ndarray:
    """What the canvas shows, RGB, int, shape (height, width, 3)."""
    shown = page.locator("#canvas").evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2]))).convert("RGB")).astype(int)


def number(page: Page, name: str) -> int:
    return int(page.locator(f"#{name}").inner_text())


def middle(page: Page) -> tuple[float, float]:
    box = page.locator("#viewer").bounding_box()
    assert box
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_a_page_leads_through_the_sign_in_to_what_was_asked_for(
    visit: Callable[..., Visitor], guarded_service: RunningService, kept: Kept
) -> None:
    visitor = visit()
    page = visitor.open(f"/studies/{kept.study}")
    assert page.url.startswith(f"{guarded_service.url}/login?next=")
    assert_readable_by_everybody(page)
    with page.expect_response(lambda response: response.request.method == "POST") as refused:
        page.get_by_label("Token").fill("cxr_wrong")
        page.get_by_role("button", name="Sign in").click()
    assert refused.value.status == 401
    expect(page.get_by_role("alert")).to_have_text("This token is not known here, has expired or was revoked.")
    page.get_by_label("Token").fill(f" {guarded_service.token}")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{guarded_service.url}/studies/{kept.study}")
    [cookie] = visitor.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/guarded")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert visitor.context.cookies() == []
    visitor.open()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_an_open_service_shows_its_worklist_at_once(visit: Callable[..., Visitor], service: RunningService, kept: Kept) -> None:
    page = visit(service.url).open()
    expect(row_of(page, kept.study)).to_contain_text(kept.patient)
    expect(page.get_by_role("button", name="Sign out")).to_have_count(0)


def test_the_worklist_says_what_was_found(
    visit: Callable[..., Visitor], guarded_service: RunningService, http: httpx.Client, kept: Kept, keep: Callable[..., Kept]
) -> None:
    refused = keep(0, 422, BodyPartExamined="HAND")
    page = visit().sign_in(guarded_service.token)
    assert_readable_by_everybody(page)
    row = row_of(page, kept.study)
    found = http.get(f"/v1/studies/{kept.study}").json()["instances"][0]["findings"]
    found.sort(key=lambda one: (not one["positive"], -one["probability"]))
    for index, finding in enumerate(found[:3]):
        shown = row.get_by_role("listitem").nth(index)
        expect(shown).to_contain_text(finding["name"].replace("_", " "))
        expect(shown).to_contain_text("positive" if finding["positive"] else "%")
        bar = float(shown.locator(".value").get_attribute("width").rstrip("%"))
        mark = float(shown.locator(".mark").get_attribute("x").rstrip("%"))
        assert (bar >= mark) is finding["positive"]
        assert bar == pytest.approx(100 * finding["probability"] ** 0.5, abs=0.06)
    expect(row.locator(".state")).to_have_text("answered")
    expect(row_of(page, refused.study)).to_contain_text("BodyPartExamined is HAND")
    expect(row_of(page, refused.study)).to_contain_text("refused")
    row_of(page, refused.study).get_by_role("link").click()
    expect(page.locator("main")).to_contain_text("BodyPartExamined is HAND")
    assert page.title() == "Study · cxr-ray"


def test_a_study_that_comes_is_shown_and_announced_and_moves_nothing(
    visit: Callable[..., Visitor], guarded_service: RunningService, kept: Kept, keep: Callable[..., Kept]
) -> None:
    page = visit().sign_in(guarded_service.token)
    link = row_of(page, kept.study).get_by_role("link")
    link.focus()
    page.evaluate("window.stillHere = true")
    new = keep(1)
    expect(row_of(page, new.study)).to_be_visible()
    expect(page.locator("tbody tr").first).to_have_attribute("data-study", new.study)
    expect(page.get_by_role("status").last).to_have_text("1 new study")
    expect(link).to_be_focused()
    assert page.evaluate("window.stillHere")


def test_a_search_for_a_patient_is_in_no_address(
    visit: Callable[..., Visitor], guarded_service: RunningService, kept: Kept, keep: Callable[..., Kept]
) -> None:
    other, visitor = keep(1), visit()
    page = visitor.sign_in(guarded_service.token)
    page.get_by_label("Patient ID").fill(kept.patient)
    page.get_by_role("button", name="Filter").click()
    expect(row_of(page, other.study)).to_have_count(0)
    expect(row_of(page, kept.study)).to_be_visible()
    row_of(page, kept.study).get_by_role("link").click()
    page.go_back()
    expect(row_of(page, other.study)).to_have_count(0)
    page.get_by_role("link", name="Clear").click()
    expect(row_of(page, other.study)).to_be_visible()
    page.get_by_label("State").select_option("refused")
    page.get_by_role("button", name="Filter").click()
    expect(row_of(page, kept.study)).to_have_count(0)
    expect(page).to_have_url(re.compile("status=refused"))
    assert not [address for address in visitor.addresses if kept.patient in address]


def test_the_film_is_windowed_by_drag_and_keys(reading: Page) -> None:
    page, whole = reading, pixels(reading)
    assert whole.std() > 20
    x, y = middle(page)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 120, y + 60, steps=4)
    page.mouse.up()
    width, level = number(page, "width"), number(page, "level")
    assert width < 256
    assert level > 128
    narrow = pixels(page)
    # The same film through that window, where it is neither black nor white.
    expected = np.clip((whole - level + width / 2) / width * 255, 0, 255)
    assert np.abs(narrow - expected).mean() < 3
    assert np.abs(narrow - whole).mean() > 10
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert (number(page, "width"), number(page, "level")) == (width + 8, level - 8)
    page.keyboard.press("r")
    assert (number(page, "width"), number(page, "level")) == (256, 128)
    assert (pixels(page) == whole).all()
    page.get_by_role("button", name="Invert").click()
    inside = whole > 0
    assert np.abs(pixels(page) - (255 - whole))[inside].max() <= 1


def test_the_film_is_zoomed_at_the_pointer_and_moved(reading: Page) -> None:
    page, whole = reading, pixels(reading)
    height, width = whole.shape[:2]
    x, y = middle(page)
    page.mouse.move(x + 100, y - 50)
    page.mouse.wheel(0, -350)
    expect(page.locator("#zoom")).not_to_have_text("100")
    zoom, near = number(page, "zoom") / 100, pixels(page)
    at = height // 2 - 50, width // 2 + 100
    # What lies under the pointer stays there, at twice the size.
    reach = 20
    expected = Image.fromarray(whole.astype(np.uint8)[at[0] - reach : at[0] + reach, at[1] - reach : at[1] + reach])
    edge = round(2 * reach * zoom)
    part = near[at[0] - edge // 2 : at[0] + edge // 2, at[1] - edge // 2 : at[1] + edge // 2]
    enlarged = np.asarray(expected.resize(part.shape[1::-1], Image.Resampling.BICUBIC)).astype(int)
    assert zoom == pytest.approx(2, abs=0.3)
    assert np.abs(part - enlarged).mean() < 6
    page.mouse.down(button="right")
    page.mouse.move(x + 60, y - 50)
    page.mouse.up(button="right")
    assert np.abs(pixels(page)[:, 40:-80] - near[:, 80:-40]).mean() < 3
    page.keyboard.press("-")
    assert number(page, "zoom") == pytest.approx(80 * zoom, abs=1)
    page.locator("#viewer").dblclick()
    assert (pixels(page) == whole).all()


def test_the_heatmap_of_the_chosen_finding_lies_over_the_windowed_film(reading: Page) -> None:
    page, film = reading, pixels(reading)
    state, seen = page.locator("#state"), []
    for radio in page.get_by_role("radio").all()[:5]:
        radio.click()
        name = radio.get_attribute("value").replace("_", " ")
        expect(state).to_have_text(re.compile(f"^(Heatmap: |Nothing on the film speaks for ){name}$"))
        seen.append(pixels(page))
        if state.inner_text().startswith("Nothing"):
            assert (seen[-1] == film).all()
        else:
            assert np.abs(seen[-1] - film).max() > 2
    assert sum(np.abs(one - film).max() > 20 for one in seen) > 1
    page.get_by_role("radio").nth(max(range(len(seen)), key=lambda index: np.abs(seen[index] - film).sum())).click()
    shown = pixels(page)
    # Warm: what lies over the grey film adds red, not blue.
    assert (shown[..., 0] - shown[..., 2]).max() > 30
    page.get_by_label("Opacity").fill("40")
    assert np.abs(pixels(page) - film).mean() < 0.6 * np.abs(shown - film).mean()
    page.locator("#viewer").press("ArrowLeft")
    assert not (pixels(page) == shown).all()
    page.locator("#viewer").press("r")
    page.locator("#viewer").press("h")
    assert (pixels(page) == film).all()
    expect(page.get_by_label("Heatmap", exact=True)).not_to_be_checked()


def test_a_verdict_is_kept_shown_and_taken_back(
    visit: Callable[..., Visitor], token: Callable[[Role], tuple[str, str]], keep: Callable[..., Kept], store: Store
) -> None:
    study, (name, secret) = keep(2), token("write")
    page = opened(visit().sign_in(secret, f"/studies/{study.study}"))

    def said(finding: str) -> Locator:
        return page.locator(f'tr[data-finding="{finding}"] .said')

    page.get_by_role("button", name="Confirm Mass", exact=True).click()
    expect(said("Mass")).to_have_text(f"confirmed by {name}")
    expect(page.get_by_role("status").last).to_have_text("Mass: confirmed")
    expect(page.get_by_role("button", name="Take back the verdict on Mass")).to_be_focused()
    page.get_by_role("button", name="Reject Pleural Thickening").press("Enter")
    expect(said("Pleural_Thickening")).to_have_text(f"rejected by {name}")
    kept = {review.finding: (review.verdict, review.actor) for review in store.study(study.study).reviews}
    assert kept == {"Mass": ("confirmed", name), "Pleural_Thickening": ("rejected", name)}
    page.reload()
    expect(said("Mass")).to_have_text(f"confirmed by {name}")
    page.get_by_role("button", name="Take back the verdict on Mass").click()
    expect(said("Mass")).to_be_hidden()
    expect(page.get_by_role("button", name="Confirm Mass", exact=True)).to_be_focused()
    assert [review.finding for review in store.study(study.study).reviews] == ["Pleural_Thickening"]
    page.get_by_role("link", name="Worklist").click()
    expect(row_of(page, study.study).locator(".state")).to_have_text("reviewed")
    looks = [(look.actor, look.action) for look in store.accesses(study.study)]
    assert {(name, "read study"), (name, "read film"), (name, "review Mass: confirmed")} <= set(looks)


def test_readers_meet_pseudonyms_everywhere(
    visit: Callable[..., Visitor],
    guarded_service: RunningService,
    token: Callable[[Role], tuple[str, str]],
    keep: Callable[..., Kept],
    store: Store,
) -> None:
    study, (_, secret) = keep(), token("read")
    again = keep(1, PatientID=study.patient)
    pseudonym = store.pseudonym(study.patient)
    page = visit().sign_in(secret)
    for each in (study, again):
        expect(row_of(page, each.study).locator(".patient")).to_have_text(pseudonym)
    expect(page.get_by_label("Patient ID")).to_have_count(0)
    assert "MRN-" not in page.content()
    row_of(page, study.study).get_by_role("link").click()
    expect(opened(page).get_by_role("heading", level=1)).to_have_text(pseudonym)
    assert not re.search("MRN-|ACC-4711", page.content())
    expect(page.get_by_role("button", name=re.compile("Confirm|Reject|Take back"))).to_have_count(0)
    bearer = {"Authorization": f"Bearer {secret}"}
    with httpx.Client(base_url=guarded_service.url, headers=bearer, timeout=60, trust_env=False) as http:
        listed = http.get("/v1/studies").json()["studies"]
        answers = [*listed, http.get(f"/v1/studies/{study.study}").json()]
        of_patient = {answer["patient_id"] for answer in answers if answer["study_instance_uid"] in {study.study, again.study}}
        assert of_patient == {pseudonym}
        assert all(answer["accession_number"] is None for answer in answers)
        assert_problem(http.get("/v1/studies", params={"patient_id": study.patient}), 403, "patient_id", "pseudonyms")
        assert_problem(http.get("/v1/studies", params={"accession_number": "ACC-4711"}), 403, "accession_number")
        assert_problem(http.get("/worklist/rows", headers={"X-Patient-ID": study.patient}), 403, "patient_id")
        assert_problem(http.get(f"/v1/patients/{study.patient}/history"), 403)
        assert_problem(http.put(f"/v1/studies/{study.study}/findings/Mass/review", params={"verdict": "confirmed"}), 403)


@pytest.mark.parametrize("where", ["worklist", "study"])
def test_a_token_that_is_revoked_covers_what_is_open(
    where: str, visit: Callable[..., Visitor], token: Callable[[Role], tuple[str, str]], kept: Kept, store: Store
) -> None:
    name, secret = token("write")
    visitor = visit()
    page = visitor.sign_in(secret, "/" if where == "worklist" else f"/studies/{kept.study}")
    expect(page.locator("main")).to_contain_text(kept.patient)
    came_for = page.url
    store.revoke_token(name)
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("Your session has ended", timeout=REVOKED_SECONDS * 1000)
    assert kept.patient not in page.content()
    expect(page.locator("canvas")).to_have_count(0)
    link = page.get_by_role("link", name="Sign in again")
    expect(link).to_be_focused()
    link.click()
    page.get_by_label("Token").fill(token("write")[1])
    page.keyboard.press("Enter")
    expect(page).to_have_url(came_for)


def test_a_study_is_read_by_keyboard_alone(
    visit: Callable[..., Visitor], guarded_service: RunningService, keep: Callable[..., Kept]
) -> None:
    study = keep()
    page = visit().sign_in(guarded_service.token)
    expect(row_of(page, study.study)).to_be_visible()
    first = row_of(page, study.study).get_by_role("link")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the studies")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(first).to_be_focused()
    page.keyboard.press("Enter")
    expect(opened(page).locator("#viewer")).to_be_focused()
    page.keyboard.press("h")
    expect(page.locator("#state")).to_have_text(re.compile("^(Heatmap: |Nothing )"))
    assert_readable_by_everybody(page)
    page.get_by_role("radio").first.focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("radio").nth(1)).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name=re.compile("^Confirm")).nth(1)).to_be_focused()


def test_both_pages_fit_a_phone(visit: Callable[..., Visitor], guarded_service: RunningService, kept: Kept) -> None:
    phone = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    page = phone.sign_in(guarded_service.token)
    expect(row_of(page, kept.study)).to_be_visible()
    assert_fits(page)
    opened(phone.open(f"/studies/{kept.study}"))
    assert_fits(page)


def test_several_images_of_a_study_are_told_apart(
    visit: Callable[..., Visitor], guarded_service: RunningService, keep: Callable[..., Kept]
) -> None:
    study = keep(0)
    keep(3, StudyInstanceUID=study.study)
    keep(0, 422, StudyInstanceUID=study.study, ViewPosition="LL")
    page = opened(visit().sign_in(guarded_service.token, f"/studies/{study.study}"))
    first = pixels(page)
    images = page.get_by_role("navigation", name="Images of the study").get_by_role("link")
    expect(images).to_have_text([re.compile("Image 1, (PA|AP)"), re.compile("Image 2, (PA|AP)"), "Image 3, refused"])
    images.nth(1).click()
    expect(images.nth(1)).to_have_attribute("aria-current", "page")
    assert np.abs(pixels(opened(page)) - first).mean() > 1
    images.nth(2).click()
    expect(page.locator("main")).to_contain_text("ViewPosition is LL")


def test_what_another_site_makes_a_browser_send_is_refused(guarded_service: RunningService, kept: Kept, store: Store) -> None:
    cookies = {"cxr_session": guarded_service.token}
    with httpx.Client(base_url=guarded_service.url, timeout=60, trust_env=False, cookies=cookies) as browser:
        review = f"/v1/studies/{kept.study}/findings/Hernia/review?verdict=confirmed"
        for headers in (EVIL, {"Sec-Fetch-Site": "same-site"}, {}):
            assert_problem(browser.put(review, headers=headers), 403, "another site")
            assert_problem(browser.post("/v1/predict", files={"image": b"x"}, headers=headers), 403, "another site")
        assert "Hernia" not in {review.finding for review in store.study(kept.study).reviews}
        assert browser.put(review, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200
    form = {"token": guarded_service.token, "next": ""}
    for path in ("/login", "/logout"):
        answer = httpx.post(guarded_service.url + path, data=form, headers=EVIL, trust_env=False)
        assert (answer.status_code, answer.headers.get("set-cookie")) == (403, None)


@pytest.mark.parametrize("elsewhere", ["//evil.example/", "https://evil.example/", "/\\evil.example", "/guarded/\n//evil", "x"])
def test_the_sign_in_leads_nowhere_else(guarded_service: RunningService, elsewhere: str) -> None:
    form = {"token": guarded_service.token, "next": elsewhere}
    answer = httpx.post(f"{guarded_service.url}/login", data=form, trust_env=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/guarded/")
    assert "secure" not in answer.headers["set-cookie"].lower()
    over_tls = {"X-Forwarded-Proto": "https"}
    answer = httpx.post(f"{guarded_service.url}/login", data=form, headers=over_tls, trust_env=False)
    assert "secure" in answer.headers["set-cookie"].lower()


def test_errors_are_pages_and_files_are_kept_by_their_digest(http: httpx.Client) -> None:
    missing = http.get("/studies/1.2.3")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert "1.2.3" in missing.text
    assert http.get("/", params={"page": "zero"}).status_code == 400
    page = http.get("/")
    assert page.headers["cache-control"] == "no-store"
    assert "default-src 'self'" in page.headers["content-security-policy"]
    style = re.search(r'href="/guarded(/static/[^"]+\.css)"', page.text).group(1)
    assert "immutable" in http.get(style).headers["cache-control"]
    other = re.sub("static/[0-9a-f]+/", "static/0123456789ab/", style)
    assert (http.get(other).status_code, http.get(other).headers["cache-control"]) == (200, "no-store")
    assert http.get("/static/x/..%2frouting.py").status_code == 404
    rows = http.get("/worklist/rows")
    assert http.get("/worklist/rows", headers={"If-None-Match": rows.headers["etag"]}).status_code == 304
