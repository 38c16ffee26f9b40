"""Looks of HTML pages in headless Chromium: overflow, contrast, size of letters, messages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for found in map(shutil.which, _NAMES) if found is not None), None)

_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom")
_OPTIONS += (
    "--disable-background-networking",
    "--enable-logging=stderr",
    "--window-size=1500,1000",
)

# Every page in a frame of every width, light and dark, which a frame takes from its element. Contrast is the ratio of WCAG 2, of letters and paper.
_HARNESS = """<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre><script>
const pages = PAGES, widths = [400, 1400], schemes = ["light", "dark"], found = [];
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
function light(colour) {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(v => linear(v / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
}
function contrast(a, b) {
  return Math.max(light(a) / light(b), light(b) / light(a));
}
function look(frame, width, scheme, name) {
  const view = frame.contentWindow, page = frame.contentDocument;
  const paper = view.getComputedStyle(page.body).backgroundColor;
  const colour = it => it.tagName == "text" ? view.getComputedStyle(it).fill : view.getComputedStyle(it).color;
  const own = it => [...it.childNodes].some(part => part.nodeType == 3 && part.data.trim());
  const texts = [...page.body.querySelectorAll("*")].filter(it => own(it) && it.getClientRects().length);
  const letters = texts.filter(it => it.tagName == "text").map(it => it.getBoundingClientRect().height);
  const free = texts.filter(it => !it.closest(".scroll, pre"));
  const fetched = view.performance.getEntriesByType("resource").map(it => it.name);
  found.push({
    name, width, scheme, paper, texts: texts.length,
    scroll: page.documentElement.scrollWidth,
    outside: free.filter(it => it.getBoundingClientRect().right > width + 1).map(it => it.textContent),
    contrast: Math.min(...texts.map(it => contrast(colour(it), paper))),
    letters: Math.min(99, ...letters),
    fetched: fetched.filter(it => !it.startsWith("data:")),
  });
  document.getElementById("found").textContent = JSON.stringify(found);
}
for (const [name, text] of Object.entries(pages)) for (const width of widths) for (const scheme of schemes) {
  const frame = document.createElement("iframe");
  frame.style = `border: 0; width: ${width}px; height: 900px; color-scheme: ${scheme}`;
  frame.onload = () => look(frame, width, scheme, name);
  frame.srcdoc = text;
  document.body.append(frame);
}
</script>"""


def looks(pages: dict[str, str], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Measurements of every page at 400 and 1,400 pixels, light and dark, and the browser's messages.

    Arguments:
        pages: HTML by name.
        folder: An empty folder for files of the browser.
    """
    assert BROWSER is not None
    harness = folder / "harness.html"
    data = json.dumps(pages).replace("</", "<\\/")
    harness.write_text(_HARNESS.replace("PAGES", data), encoding="utf-8")
    command = [BROWSER, *_OPTIONS, f"--user-data-dir={folder / 'user'}", harness.as_uri()]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1])), done.stderr
