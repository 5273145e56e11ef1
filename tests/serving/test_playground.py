"""The playground in a real browser: headless Chromium, used like a person would."""

import json
import shutil
import time
from pathlib import Path

import pytest
from gateway import world as world  # the fixture

from mta.store.state import State

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver"),
]


@pytest.fixture
def page(world):
    """The page in a browser window of phone size."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=420,1400"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.get(world.url)
        yield browser
        wrong = [row["message"] for row in browser.get_log("browser") if row["level"] == "SEVERE"]
        assert [message for message in wrong if "401" not in message and "404" not in message] == []
    finally:
        browser.quit()


def at(page, id):
    return page.find_element("id", id)


def until(page, what, seconds=60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(page, seconds).until(lambda _: what())


def type_in(page, id, text):
    from selenium.webdriver.common.keys import Keys

    at(page, id).clear()
    at(page, id).send_keys(text, Keys.TAB)


def test_ask_add_personalize_and_forget(page, world):
    from selenium.webdriver.common.keys import Keys

    until(page, lambda: "API key" in at(page, "state").text)
    type_in(page, "key", world.secrets["ann"])
    until(page, lambda: "Version 1" in at(page, "state").text)
    assert at(page, "person").get_attribute("value") == "ann"
    assert [bar.text for bar in page.find_elements("css selector", ".bars .number")] == ["30.000", "-20.000", "0.000"]

    page.find_element("css selector", "#examples button").click()
    title = page.find_element("css selector", "#question textarea[name=title]")
    assert title.get_attribute("value") == "Pulp Fiction"
    title.send_keys(Keys.CONTROL, Keys.ENTER)
    until(page, lambda: len(page.find_elements("css selector", ".answer[data-done=yes]")) == 4)
    shares = [bar.get_attribute("aria-label") for bar in page.find_elements("css selector", "#chart .share")]
    assert len(shares) == 4 * 5
    assert not at(page, "tokens").is_displayed()
    wide = page.execute_script("return [...document.querySelectorAll('#chart .share')].map(b => b.style.width)")
    columns = [tuple(wide[n::4]) for n in range(4)]
    assert len(set(columns)) == 4
    assert all(sum(float(width.rstrip("%")) for width in column) == pytest.approx(100, abs=0.1) for column in columns)

    for name, text in (("title", "Film 9"), ("genres", "Drama")):
        page.find_element("css selector", f"#item [name={name}]").send_keys(text)
    page.find_element("css selector", "#add button[type=submit]").click()
    until(page, lambda: "1 items are in memory" in at(page, "done").text)
    (added,) = world.service.histories.of("ann").items
    assert added.time == pytest.approx(time.time(), abs=600)  # after all others, so that the state is updated with it
    at(page, "personalize").click()
    until(page, lambda: "version 2" in at(page, "done").text)
    until(page, lambda: "Version 2" in at(page, "state").text)

    at(page, "forget").click()
    page.switch_to.alert.accept()
    until(page, lambda: "Forgotten" in at(page, "done").text)
    assert world.service.store.latest("ann") is None


def test_free_text_is_streamed_from_four_models(page, world, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    world.service.store.save(
        "ann", State(world.service.engine.bank.hash, (0, 1, 2), (30.0, -20.0, 5.0), "fixed", "", "w", 0)
    )
    wording = world.service.task.item.model_copy(update={"prompt": 'As {{"mood": …}}: {title}{genres}'})
    free = world.service.task.model_copy(update={"labels": None, "metric": "rouge", "item": wording})
    monkeypatch.setattr(world.service, "task", free)
    page.refresh()
    type_in(page, "key", world.secrets["ann"])
    until(page, lambda: "Version 1" in at(page, "state").text)
    page.execute_script("sent = []; before = fetch; fetch = (to, how) => (sent.push(how?.body), before(to, how))")
    title = page.find_element("css selector", "#question textarea[name=title]")
    title.send_keys("Film 7", Keys.CONTROL, Keys.ENTER)
    until(page, lambda: len(page.find_elements("css selector", ".answer[data-done=yes]")) == 4)
    asked = [json.loads(body)["messages"][0]["content"] for body in page.execute_script("return sent") if body]
    assert asked == ['As {"mood": …}: Film 7'] * 4  # a template writes {{ for a brace
    answers = [card.text for card in page.find_elements("css selector", ".answer p")]
    assert len(set(answers)) >= 3  # merge and person are the same without a stack
    assert page.find_elements("css selector", "#chart *") == []


def test_you_answer_eight_and_see_the_rest_predicted(page, world, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    films = tuple({"title": f"Film {n}", "genres": "Drama"} for n in range(11))
    monkeypatch.setattr(world.service, "task", world.service.task.model_copy(update={"examples": films}))
    page.refresh()
    type_in(page, "key", world.secrets["admin"])
    until(page, lambda: at(page, "you").is_displayed())
    sliders = page.find_elements("css selector", "#given input")
    assert len(sliders) == 8
    sliders[0].send_keys(Keys.ARROW_RIGHT)
    at(page, "mine").click()
    until(page, lambda: "Made from 8 answers" in at(page, "made").text)
    person = page.execute_script("return me.id")
    given = [item.fields["rating"] for item in world.service.histories.of(person).items]
    assert given == ["4", *["3"] * 7]
    bars = [bar.get_attribute("aria-label") for bar in page.find_elements("css selector", "#rest .bar")]
    assert len(bars) == 2 * 3
    assert [bar.partition(":")[0] for bar in bars[:2]] == ["Everybody's model", "Yours"]
    page.find_element("css selector", "#rest select").send_keys("5")
    until(page, lambda: "1 true answers: your model is off by" in at(page, "made").text)
    at(page, "mine").click()
    until(page, lambda: "Made from 9 answers" in at(page, "made").text)
    assert len(page.find_elements("css selector", "#rest select")) == 2
    at(page, "unmake").click()
    until(
        page, lambda: page.execute_script("return document.readyState === 'complete' && me.id") not in (False, person)
    )
    assert world.service.histories.of(person) is None
    assert world.service.store.latest(person) is None


def test_the_page_loads_nothing_external_and_stores_no_key(page, world):
    type_in(page, "key", world.secrets["serve"])
    until(page, lambda: page.find_elements("css selector", "#question textarea"))
    loaded = page.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert all(address.startswith(world.url) for address in loaded)
    assert page.execute_script("return localStorage.length + sessionStorage.length + document.cookie.length") == 0
    assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    source = (Path(__file__).parents[2] / "src/mta/serving/api/playground.html").read_text()
    assert "http://" not in source
    assert "https://" not in source
