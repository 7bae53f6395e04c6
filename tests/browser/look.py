"""Pictures of pages, to look at: a populated registry is served, and each page is photographed.

    python tests/browser/look.py / /checkpoints --out pictures [--dark] [--phone] [--full]

Pages may be given as paths of the populated registry, or as whole URLs of a server that runs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]

from playwright.sync_api import sync_playwright  # noqa: E402
from populated import populate  # noqa: E402
from running import serving, settings_of  # noqa: E402

from registry.service import Registry  # noqa: E402

CHROMIUM = "/usr/bin/chromium"


def main() -> None:
    said = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    said.add_argument("pages", nargs="+")
    said.add_argument("--out", type=Path, default=Path("pictures"))
    said.add_argument("--dark", action="store_true")
    said.add_argument("--phone", action="store_true")
    said.add_argument("--empty", action="store_true", help="of a registry with nothing in it")
    found = said.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = settings_of(folder / "home")
        if not found.empty:
            with Registry(settings) as registry:
                populate(registry, folder)
        url = stack.enter_context(serving(settings)).url
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=os.environ.get("CHROMIUM", CHROMIUM), args=["--no-sandbox"]
        )
        size = {"width": 390, "height": 844} if found.phone else {"width": 1360, "height": 900}
        page = browser.new_page(viewport=size, color_scheme="dark" if found.dark else "light")
        page.on("console", lambda message: print("console:", message.type, message.text))
        page.on("pageerror", lambda error: print("error:", error))
        found.out.mkdir(parents=True, exist_ok=True)
        for path in found.pages:
            answer = page.goto(path if "://" in path else url + path, wait_until="load")
            page.wait_for_timeout(400)
            name = re.sub(r"\W+", "-", path).strip("-") or "overview"
            kind = ("-dark" if found.dark else "") + ("-phone" if found.phone else "")
            target = found.out / f"{name[:60]}{kind}.png"
            page.screenshot(path=target, full_page=True)
            wide = page.evaluate("document.documentElement.scrollWidth > innerWidth + 1")
            print(answer.status if answer else "-", path, target, "(wider than the window!)" if wide else "")
        browser.close()


if __name__ == "__main__":
    main()
