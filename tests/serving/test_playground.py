"""The playground in a real browser: what a person sees after dropping a sound, a picture or a film, by keyboard too."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_service import Server, serving
from small_models import sample_files, write_model

from bridle.model_folder import load

pytest.importorskip("selenium")

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs Debian's chromium and chromium-driver")
FILES = {"audio": ("audio", ("flac",)), "image": ("image", ("jpg", "png")), "video": ("video", ("mp4",))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("three")
    return {modality: write_model(folder / modality, modality) for modality in FILES}


@pytest.fixture(scope="module")
def all_three(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("play"), *folders.values(), decode_workers=1) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    microphone = ("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream")  # beeps, and needs no click
    offline = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    plain = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1100,1300")
    gesture = ("--autoplay-policy=no-user-gesture-required",)
    for word in (*plain, *offline, *microphone, *gesture):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


def status_of(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "status").text


def wait(browser: webdriver.Chrome, words: str) -> None:
    WebDriverWait(browser, 120).until(lambda b: words in status_of(b), f"the status stayed {status_of(browser)!r}")


def told_in(browser: webdriver.Chrome, name: str, words: str) -> str:
    """What an element says, once it says `words`."""
    element = browser.find_element(By.ID, name)
    WebDriverWait(browser, 120).until(lambda _: words in element.text)
    return element.text


def tokenize(browser: webdriver.Chrome, server: Server, path: Path) -> None:
    browser.get(server.url + "/")
    WebDriverWait(browser, 120).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#model option")) == 4)
    browser.find_element(By.ID, "file").send_keys(str(path))
    wait(browser, "Done")


@pytest.mark.parametrize("modality", FILES)
def test_a_file_shows_its_picture_and_a_layer_for_each_codebook(
    browser: webdriver.Chrome, all_three: Server, folders: dict[str, Path], modality: str, tmp_path: Path
) -> None:
    name, extensions = FILES[modality]
    path = tmp_path / f"it's a {modality}.{extensions[0]}"
    path.write_bytes(max(sample_files(name, extensions, 20), key=len))
    stream = load(folders[modality]).tokenize(path)
    tokenize(browser, all_three, path)

    facts = browser.find_element(By.ID, "facts").text
    assert f"{modality}-test" in facts
    assert all(f"{axis} {size}" in facts for axis, size in stream.grid.items()), (facts, stream.grid)
    picture = browser.find_element(By.ID, "picture")
    assert browser.execute_script("return arguments[0].naturalWidth", picture) >= 64
    assert picture.get_attribute("alt")
    layers = browser.find_elements(By.CSS_SELECTOR, "#layers canvas")
    assert len(layers) == 4
    colours = (
        "const d = arguments[0].getContext('2d').getImageData(0, 0, arguments[0].width, arguments[0].height).data;"
    )
    colours += "return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4 * i, 4 * i + 3).join())).size"
    for book, layer in enumerate(layers):
        different = len(stream.codes[:, book].unique())
        assert layer.get_attribute("aria-label") == f"Codebook {book + 1}: {different} different codes"
        assert 0.5 * different <= browser.execute_script(colours, layer) <= different

    browser.find_element(By.CSS_SELECTOR, "[data-copy=codes]").click()
    wait(browser, "codes")
    assert json.loads(browser.find_element(By.ID, "copied").get_property("value")) == stream.codes.T.tolist()
    browser.find_element(By.CSS_SELECTOR, "[data-copy=curl]").click()
    wait(browser, "curl")
    command = browser.find_element(By.ID, "copied").get_property("value")
    assert command.startswith(f"curl --data-binary '@it'\\''s a {modality}") and all_three.url + "/tokenize" in command
    if folder := os.environ.get("BRIDLE_SCREENSHOTS"):
        browser.save_screenshot(f"{folder}/playground-{modality}.png")
    wrong = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]  # type: ignore[no-untyped-call]
    assert wrong == []


def test_everything_is_reached_and_worked_by_keyboard(
    browser: webdriver.Chrome, all_three: Server, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "sound.flac"
    path.write_bytes(max(sample_files("audio", ("flac",), 20), key=len))
    codes = load(folders["audio"]).tokenize(path).codes
    tokenize(browser, all_three, path)
    reached = []
    ActionChains(browser).send_keys(Keys.TAB).perform()
    for _ in range(40):
        active = browser.switch_to.active_element
        reached.append(active.get_attribute("id") or active.get_attribute("data-copy"))
        named = "const e = arguments[0]; return e.labels?.length > 0 || e.ariaLabel || e.textContent.trim().length > 0"
        assert browser.execute_script(named, active), reached[-1]
        if active.get_attribute("id") == "scrub":
            before = browser.find_element(By.ID, "here").text
            active.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
            after = browser.find_element(By.ID, "here").text
            assert after != before
            assert "codebook 1: " + " ".join(str(int(code)) for code in codes[16:24, 0]) in after
            assert active.get_attribute("aria-valuetext").endswith(" s")
        if active.tag_name == "canvas" and not browser.find_elements(By.CLASS_NAME, "found"):
            active.send_keys(Keys.ENTER)
            code = int(codes[0, 0])
            count = int((codes[:, 0] == code).sum())
            told = browser.find_element(By.ID, "places").text
            assert told.startswith(f"Code {code} of codebook 1: {count} of {len(codes)} places, at seconds 0.00")
            assert browser.find_element(By.ID, "hear").is_displayed()
            steps = len({int(at) // 8 for at in (codes[:, 0] == code).nonzero()})
        if active.get_attribute("id") == "hear":
            active.send_keys(Keys.ENTER)
            wait(browser, f"Playing {min(steps, 60)} patches of code {code}.")
        if active.get_attribute("id") == "coarse":
            active.send_keys(Keys.ARROW_LEFT)
            told = told_in(browser, "coarse-said", "3 of 4 codebooks")
            assert 0 < float(told.split(": ")[1].split(" %")[0]) < 200
            active.send_keys(Keys.ARROW_RIGHT)
            told_in(browser, "coarse-said", "4 of 4 codebooks: 0.0 %")
        if active.get_attribute("id") == "book-0":
            active.send_keys(Keys.SPACE)
            assert not browser.find_element(By.ID, "layer-0").is_displayed()
        if active.get_attribute("data-copy") == "ids":
            active.send_keys(Keys.ENTER)
            wait(browser, "ids")
            copied = browser.find_element(By.ID, "copied").get_property("value").split()
            assert len(copied) == codes.numel()
        if reached[-1] == "copied":
            break
        ActionChains(browser).send_keys(Keys.TAB).perform()
    wanted = {
        "file",
        "record",
        "model",
        "scrub",
        "book-0",
        "book-3",
        "layout",
        "offset",
        "codes",
        "ids",
        "text",
        "curl",
    }
    assert wanted <= set(reached)
    Select(browser.find_element(By.ID, "model")).select_by_value("image-test")
    wait(browser, "No loaded model takes this kind of content")


def test_sound_plays_with_the_cursor_and_two_files_are_compared(
    browser: webdriver.Chrome, all_three: Server, tmp_path: Path
) -> None:
    first, second = sorted(sample_files("audio", ("flac",), 20), key=len)[-2:]
    for name, content in (("first.flac", first), ("second.flac", second)):
        (tmp_path / name).write_bytes(content)
    tokenize(browser, all_three, tmp_path / "first.flac")
    player = browser.find_element(By.ID, "player")
    assert player.is_displayed()
    browser.execute_script("arguments[0].muted = true; return arguments[0].play()", player)
    scrub = browser.find_element(By.ID, "scrub")
    WebDriverWait(browser, 120).until(lambda _: int(scrub.get_property("value")) > 0)  # type: ignore[arg-type]
    browser.find_element(By.ID, "other").send_keys(str(tmp_path / "first.flac"))
    common = browser.find_element(By.ID, "common")
    WebDriverWait(browser, 120).until(lambda _: "first.flac" in common.text)
    assert common.text.count("100 %") == 4
    pixels = "const c = arguments[0]; return c.toDataURL()"
    layers = browser.find_elements(By.CSS_SELECTOR, "#layers .layer")
    for layer in layers:  # the file beside itself looks the same
        own, beside = layer.find_elements(By.TAG_NAME, "canvas")
        assert browser.execute_script(pixels, own) == browser.execute_script(pixels, beside)
    browser.find_element(By.ID, "other").send_keys(str(tmp_path / "second.flac"))
    WebDriverWait(browser, 120).until(lambda _: "second.flac" in common.text)
    assert len(browser.find_elements(By.CLASS_NAME, "beside")) == len(layers) == 4
    label = browser.find_element(By.CSS_SELECTOR, ".beside canvas").get_attribute("aria-label")
    assert str(label).startswith("Codebook 1 of second.flac: ")
    browser.set_window_size(420, 900)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    if folder := os.environ.get("BRIDLE_SCREENSHOTS"):
        browser.find_element(By.CSS_SELECTOR, "#layers canvas").click()
        for scheme in ("light", "dark"):
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})  # type: ignore[no-untyped-call]
            for name, width in (("phone", 420), ("wide", 1100)):
                browser.set_window_size(width, 1500)
                browser.save_screenshot(f"{folder}/playground-{scheme}-{name}.png")
    browser.set_window_size(1100, 1300)


DROP = """
const bytes = Uint8Array.from(atob(arguments[1]), (letter) => letter.charCodeAt(0));
const dropped = new DataTransfer();
dropped.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
arguments[0].dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true, cancelable: true }));
"""


def test_a_dropped_file_is_tokenized(
    browser: webdriver.Chrome, all_three: Server, folders: dict[str, Path], pictures: list[bytes]
) -> None:
    browser.get(all_three.url + "/")
    WebDriverWait(browser, 120).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#model option")) == 4)
    browser.execute_script(DROP, browser.find_element(By.ID, "drop"), base64.b64encode(pictures[0]).decode())
    wait(browser, "Done")
    browser.find_element(By.CSS_SELECTOR, "[data-copy=codes]").click()
    wait(browser, "codes")
    codes = json.loads(browser.find_element(By.ID, "copied").get_property("value"))
    assert codes == load(folders["image"]).tokenize(pictures[0]).codes.T.tolist()


def test_a_recording_is_tokenized(browser: webdriver.Chrome, all_three: Server) -> None:
    browser.get(all_three.url + "/")
    WebDriverWait(browser, 120).until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#model option")) == 4)
    button = browser.find_element(By.ID, "record")
    button.click()
    WebDriverWait(browser, 120).until(lambda _: button.text == "Stop recording")
    time.sleep(1.5)
    button.click()
    wait(browser, "Done")
    facts = browser.find_element(By.ID, "facts").text
    assert "audio-test" in facts
    assert len(browser.find_elements(By.CSS_SELECTOR, "#layers canvas")) == 4


def test_the_api_page_lists_every_route(browser: webdriver.Chrome, all_three: Server) -> None:
    browser.get(all_three.url + "/docs")
    WebDriverWait(browser, 120).until(lambda b: b.find_elements(By.CLASS_NAME, "operation"))
    titles = [title.text for title in browser.find_elements(By.CSS_SELECTOR, ".operation h2")]
    assert {"POST /tokenize", "POST /encode", "POST /dequantize", "GET /info"} <= set(titles)
