"""What holds of every page: controls have names, text can be read, nothing runs over a phone's edge."""

import re

from playwright.sync_api import Page, expect

_NAMELESS = re.compile(r"^\s*- (?:button|link|textbox|searchbox|combobox|checkbox|radio|slider|application|img)(?! \")", re.M)
# WCAG 2.2, 1.4.3: of each element with text of its own, the colours that the browser computed. Whatever is of large type
# counts as small, which is stricter.
_CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => channels(colour).slice(0, 3)
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((channels(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (!own || !element.checkVisibility() || ["SCRIPT", "TEMPLATE", "OPTION"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const text = element instanceof SVGElement ? style.fill : style.color;
    const [one, other] = [luminance(text), luminance(ground(element))];
    found.push([(Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05), element.outerHTML.slice(0, 80)]);
  }
  return found;
}"""


def assert_readable_by_everybody(page: Page) -> None:
    snapshot = page.locator("body").aria_snapshot()
    assert not _NAMELESS.findall(snapshot), snapshot
    for landmark in ("banner", "main"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    contrasts = page.evaluate(_CONTRASTS)
    assert len(contrasts) > 5
    assert [found for found in contrasts if found[0] < 4.5] == []


def assert_fits(page: Page) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
