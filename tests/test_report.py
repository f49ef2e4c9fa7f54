"""The page of a sweep in a real browser: it opens from disk, plays, its controls work, and nothing is fetched."""

import json
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from browser import browser_at, needs_browser, wait_for
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By

from flexivid.files import write_json
from flexivid.sweep.grids import grid_paths
from flexivid.sweep.report import write_report
from flexivid.sweep.sampling import clips_of, read_clip
from flexivid.video import enlarge, write_mp4

LINES = ["1x2x2: 2 of 6 steps", "1x4x4: 4 of 6 steps"]
pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def page(finished_sweep, tmp_path_factory):
    """The page of the small sweep, every arm but the full one there a second time at a budget of .25."""
    folder, results = finished_sweep
    prompt = next(path.name for path in (folder / "videos" / "full").iterdir()).removesuffix("-0.mp4")
    prompt = prompt.removesuffix("-1.mp4")
    copy = tmp_path_factory.mktemp("page")
    shutil.copytree(folder / "videos", copy / "videos")
    sampler = SimpleNamespace(clips=clips_of([prompt], 1, 0), folder=copy)
    # As of an arm that ran at two patch sizes.
    clip, lines = grid_paths(copy, "budget-0.5", sampler.clips[0].file_name)
    clip.parent.mkdir(parents=True)
    frames = read_clip(copy / "videos" / "budget-0.5" / clip.name, 64)
    write_mp4(enlarge(np.concatenate([frames, 255 - frames])), clip, 8)
    write_json(lines, {"lines": LINES})
    rows = list(results["arms"])
    for row in results["arms"][1:]:
        name = row["arm"] + "-again"
        shutil.copytree(folder / "videos" / row["arm"], copy / "videos" / name)
        rows.append({**row, "arm": name, "budget": 0.25, "flops_ratio": row["flops_ratio"] / 2})
    write_report({**results, "arms": rows}, sampler, [prompt], copy / "report.html")
    return copy / "report.html"


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    with browser_at(page.as_uri(), tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def videos(browser) -> list[dict]:
    return browser.execute_script(
        "return visible().map(v => ({arm: v.dataset.arm, time: v.currentTime, width: v.videoWidth, "
        "frames: v.getVideoPlaybackQuality().totalVideoFrames, error: v.error && v.error.message}))"
    )


def move_slider(browser, place: int) -> None:
    browser.execute_script(
        "const slider = byId('budget'); slider.value = arguments[0]; slider.dispatchEvent(new Event('input'))", place
    )


def table(browser) -> list[list[str]]:
    rows = browser.find_elements(By.CSS_SELECTOR, "#body tr")
    return [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]


def test_it_plays_all_arms_in_step(browser):
    playing = wait_for(
        lambda: (found := videos(browser)) and all(v["time"] > 0.3 and v["frames"] > 1 for v in found) and found,
        "every clip to play",
    )
    assert [video["arm"] for video in playing][0] == "full" and len(playing) == 4
    assert all(video["width"] > 0 and video["error"] is None for video in playing)
    times = [video["time"] for video in playing]
    assert max(times) - min(times) < 0.2


def test_it_starts_again_when_all_have_ended(browser):
    wait_for(lambda: all(v["time"] > 1.5 for v in videos(browser)), "the end")
    wait_for(lambda: all(v["time"] < 1.0 for v in videos(browser)), "the beginning")


def test_the_slider_switches_the_clips(browser):
    move_slider(browser, 0)
    low = [video["arm"] for video in videos(browser)]
    assert browser.find_element(By.ID, "shown").text == "25 %"
    move_slider(browser, 1)
    assert browser.find_element(By.ID, "shown").text == "50 %"
    assert [video["arm"] + "-again" for video in videos(browser)[1:]] == low[1:]
    wait_for(lambda: all(v["time"] > 0.3 for v in videos(browser)), "the new clips to play")


def test_methods_without_an_arm_at_a_budget_are_named(browser):
    assert browser.find_element(By.ID, "absent").text == ""
    browser.execute_script("rows.forEach(row => { if (row.method === 'magcache') row.budget += 1; }); showClips()")
    assert browser.find_element(By.ID, "absent").text == "No arm at this budget: magcache."
    assert [video["arm"] for video in videos(browser)] == ["full", "budget-0.5", "steps-3"]
    browser.execute_script("rows.forEach(row => { if (row.method === 'magcache') row.budget -= 1; }); showClips()")
    assert len(videos(browser)) == 4
    wait_for(lambda: all(v["time"] > 0.3 for v in videos(browser)), "the clips to play again")


def test_pause(browser):
    button = browser.find_element(By.ID, "play")
    button.click()
    stopped = [video["time"] for video in videos(browser)]
    time.sleep(0.5)
    assert [video["time"] for video in videos(browser)] == stopped and button.text == "play"
    button.click()
    wait_for(lambda: [video["time"] for video in videos(browser)] != stopped, "the clips to go on")


def test_the_table_sorts_and_filters(browser):
    head = browser.find_element(By.CSS_SELECTOR, "th[data-column=flops_ratio]")
    shares = [row[2] for row in table(browser)]
    assert shares == sorted(shares, key=lambda text: -float(text.split()[0])) and len(shares) == 7
    head.click()
    assert [row[2] for row in table(browser)] == sorted(shares, key=lambda text: float(text.split()[0]))
    search = browser.find_element(By.ID, "filter")
    search.send_keys("magcache")
    assert {row[1] for row in table(browser)} == {"magcache"}
    assert {video["arm"] for video in videos(browser)} == {"magcache-0.5"}
    search.clear()
    search.send_keys(" ")
    search.clear()


def points(browser) -> list[dict]:
    """Where the arms are in the window."""
    return browser.execute_script(
        "const box = byId('chart').getBoundingClientRect(); return points.map("
        "p => ({arm: p.row.arm, method: p.row.method, x: box.left + p.at, y: box.top + p.place, mean: p.value.mean}))"
    )


def choose(browser, place: str, value: str) -> None:
    browser.execute_script(
        "byId(arguments[0]).value = arguments[1]; byId(arguments[0]).dispatchEvent(new Event('change'))", place, value
    )


def test_the_curve_tells_the_arm_that_is_pointed_at(browser):
    choose(browser, "metric", "psnr")
    shown = points(browser)
    assert len(shown) == 6  # PSNR is to the full run, which has none itself
    browser.execute_script("window.scrollTo(0, 0)")
    highest = min(points(browser), key=lambda point: point["y"])
    assert highest["mean"] == max(point["mean"] for point in shown)
    move = ActionBuilder(browser)
    move.pointer_action.move_to_location(int(highest["x"]), int(highest["y"]))
    move.perform()
    tip = wait_for(lambda: browser.find_element(By.ID, "tip").text, "what is pointed at")
    assert tip.startswith(f"{highest['arm']}: psnr {highest['mean']:.1f}")
    below = browser.find_element(By.ID, "tip").rect["y"] - highest["y"]
    assert 0 < below < 40  # beside the point, not somewhere on the page
    faded = browser.execute_script("return [...document.querySelectorAll('g.faded')].map(g => g.dataset.method)")
    assert sorted(faded) == sorted({point["method"] for point in shown} - {highest["method"]})


def test_differences_to_the_full_run_and_the_stars(browser):
    choose(browser, "metric", "adherence_all")
    arms = {row[0].removesuffix(" ★") for row in table(browser)}
    assert {point["arm"] for point in points(browser)} == arms - {"full"}
    assert browser.execute_script("return document.querySelectorAll('.zero').length") == 1
    choose(browser, "metric", "psnr")
    starred = {row[0] for row in table(browser) if row[0].endswith("★")}
    best = max(points(browser), key=lambda point: point["mean"])["arm"]
    # Arms of "-again" have the same figures at half of the FLOPs.
    assert starred and all(name.endswith("-again ★") for name in starred)
    assert f"{best.removesuffix('-again')}-again ★" in starred


def test_a_method_has_one_colour_everywhere(browser):
    colours = browser.execute_script(
        """
        const own = {}, add = (method, colour) => (own[method] ??= new Set()).add(colour);
        const read = node => getComputedStyle(node).getPropertyValue("--colour").trim();
        for (const line of document.querySelectorAll("g polyline"))
          add(line.parentNode.dataset.method, line.getAttribute("stroke"));
        for (const dot of byId("legend").querySelectorAll(".dot")) add(dot.parentNode.textContent, read(dot));
        for (const line of byId("body").children) add(line.children[1].textContent, read(line.querySelector(".dot")));
        for (const video of visible())
          add(rows.find(row => row.arm === video.dataset.arm).method, read(video));
        return Object.entries(own).map(([method, set]) => [method, [...set]])
        """
    )
    assert {method for method, _ in colours} == {"full", "adapter", "steps", "magcache"}
    assert all(len(own) == 1 for _, own in colours) and len({own[0] for _, own in colours}) == 4


def test_the_table_unfolds(browser):
    count = lambda: len(browser.find_elements(By.CSS_SELECTOR, "#head th"))  # noqa: E731
    few = count()
    browser.find_element(By.ID, "every").click()
    assert count() > few and browser.find_elements(By.CSS_SELECTOR, "th[data-column=adherence_colour]")
    browser.find_element(By.ID, "every").click()
    assert count() == few
    browser.find_element(By.ID, "count").click()
    assert not browser.find_element(By.CSS_SELECTOR, ".scroll").is_displayed()
    browser.find_element(By.ID, "count").click()


def test_the_switch_shows_the_patches_that_ran(browser):
    switch = browser.find_element(By.ID, "grids")
    said = lambda: [line.text for line in browser.find_elements(By.CSS_SELECTOR, ".ran")]  # noqa: E731
    before = videos(browser)
    assert said() == []
    switch.click()
    # Clips with patches go through all of these, the others go round until they have.
    wait_for(lambda: said() == LINES[:1], LINES[0])

    def others_begin_again():
        shown = {video["arm"]: video for video in videos(browser)}
        own = shown.pop("budget-0.5")
        return own if own["time"] > 2.2 and all(video["time"] < 1.5 for video in shown.values()) else None

    with_patches = wait_for(others_begin_again, "the others to begin again")
    assert said() == LINES[1:] and with_patches["width"] == 256
    if folder := os.environ.get("FLEXIVID_SCREENSHOTS"):
        browser.save_screenshot(os.path.join(folder, "report-patches.png"))
    wait_for(lambda: said() == LINES[:1], "the beginning")
    switch.click()
    assert said() == [] and [video["arm"] for video in videos(browser)] == [video["arm"] for video in before]
    wait_for(lambda: all(v["time"] > 0.3 for v in videos(browser)), "the clips without patches to play")


def test_nothing_is_wider_than_a_phone(browser):
    before = browser.get_window_size()
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    wait_for(lambda: browser.execute_script("return byId('chart').clientWidth") < 420, "the narrow page")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
    browser.find_element(By.ID, "grids").click()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
    if folder := os.environ.get("FLEXIVID_SCREENSHOTS"):
        browser.save_screenshot(os.path.join(folder, "report-narrow.png"))
    browser.find_element(By.ID, "grids").click()
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.get_window_size() == before


def test_no_request_leaves_the_page_and_nothing_goes_wrong(browser, page):
    if folder := os.environ.get("FLEXIVID_SCREENSHOTS"):
        browser.save_screenshot(os.path.join(folder, "report.png"))
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [message["params"] for message in sent if message["method"] == "Network.requestWillBeSent"]
    # Beside those of the browser's own start page.
    addresses = [r["request"]["url"] for r in requests if r["documentURL"] == page.as_uri()]
    assert addresses and {address.split(":")[0] for address in addresses} <= {"file", "blob", "data"}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
