"""The playground as it looks after ``make demo``, saved as a picture.

python -m benchmarks.screenshot --demo demo --person 685 --out docs/pictures/playground.png
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
    words.add_argument("--person", required=True)
    words.add_argument("--out", type=Path, default=Path("docs/pictures/playground.png"))
    words.add_argument("--ask", nargs="+", default=["title=Fargo (1996)", "genres=Crime, Drama, Thriller"])
    args = words.parse_args()
    fields = dict(field.split("=", 1) for field in args.ask)
    command = [sys.executable, "-m", "mta", "serve", "--bank", str(args.demo / "bank"), "--json", "--insecure-local"]
    command += ["--store", str(args.demo / "people"), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        printed = ""
        while not printed.rstrip().endswith("}"):
            printed += server.stdout.readline()  # type: ignore[union-attr]
        picture(json.loads(printed)["url"], args.person, fields, args.out)
    finally:
        server.terminate()
        server.wait()


def picture(url: str, person: str, fields: dict[str, str], out: Path) -> None:
    """Ask one question and save what the page shows then."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for word in ("--headless=new", "--no-sandbox", "--window-size=1180,1620", "--force-device-scale-factor=1"):
        options.add_argument(word)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(url)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda b: b.find_elements("css selector", "#question textarea"))
        browser.find_element("id", "person").send_keys(person)
        browser.find_element("id", "look").click()
        wait.until(lambda b: "Version" in b.find_element("id", "state").text)
        for name, text in fields.items():
            browser.find_element("css selector", f"#question [name={name}]").send_keys(text)
        browser.find_element("css selector", "#ask button[type=submit]").click()
        wait.until(lambda b: len(b.find_elements("css selector", ".answer[data-done=yes]")) == 4)
        browser.save_screenshot(str(out))
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
