"""The playground as it looks after ``make demo``, saved as a picture.

python -m benchmarks.screenshot --demo demo --out docs/pictures/playground.png
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--demo", type=Path, default=Path("demo"))
    words.add_argument("--out", type=Path, default=Path("docs/pictures/playground.png"))
    words.add_argument("--answers", type=int, nargs=8, default=[6, 1, 6, 6, 6, 1, 1, 1], help="to the first questions")
    args = words.parse_args()
    command = [sys.executable, "-m", "mta", "serve", "--bank", str(args.demo / "bank"), "--json", "--insecure-local"]
    command += ["--store", str(args.demo / "people"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        printed = ""
        while not printed.rstrip().endswith("}"):
            printed += server.stdout.readline()  # type: ignore[union-attr]
        picture(json.loads(printed)["url"], args.answers, args.out)
    finally:
        server.terminate()
        server.wait()


def picture(url: str, answers: list[int], out: Path) -> None:
    """Answer the first questions, make a model, and save what the page shows then."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("--headless=new", "--no-sandbox", "--window-size=1180,1500", "--force-device-scale-factor=1"):
        options.add_argument(word)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(url)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda b: b.find_elements("css selector", "#given input"))
        for slider, answer in zip(browser.find_elements("css selector", "#given input"), answers, strict=True):
            set_it = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
            browser.execute_script(set_it, slider, answer)
        browser.find_element("id", "mine").click()
        wait.until(lambda b: "Made from" in b.find_element("id", "made").text)
        browser.save_screenshot(str(out))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
