"""The page with a dial: what it says, what it refuses, and the whole of it in a real browser."""

import argparse
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urljoin
from urllib.request import urlopen

import numpy as np
import pytest
from browser import browser_at, needs_browser, wait_for
from conftest import tiny_pipeline
from diffusers import LTXPipeline
from families import tiny_image_pipeline, with_text
from selenium.webdriver.common.by import By

from flexivid import app
from flexivid.app import markup, sampler
from flexivid.app.planner import Plan, Planner
from flexivid.app.sampler import Arm, Sampler
from flexivid.commands.sample import load_pipeline
from flexivid.commands.sample_options import check_model_and_adapter, check_with_model
from flexivid.model.adapter import read_config
from flexivid.sampling.budget import BudgetError
from flexivid.sampling.schedule import Schedule
from flexivid.shapes.embedded import FEW_ADAPTER
from flexivid.video import Clip

ROOT = Path(__file__).parents[1]
CAPTION = "a plain red circle growing on a black background"
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is missing: make test-app")

POWERFUL, WEAK, REUSED = ("1x2x2",) * 2, ("1x4x4",) * 2, ("reused",) * 2
SIZES = ("1x2x2", "1x4x4-guided", "1x4x4", "2x4x4")


def plan_of(*steps, share=0.25) -> Plan:
    return Plan(Schedule(steps), SIZES, 4 * 10**12, round(4e12 * share), len(steps))


def cells(text: str) -> list[tuple[str, str, str]]:
    """Of a strip: kind, colour of the upper half, of the lower half."""
    found = re.findall(r'<li class="(\w+)" style="--upper:var\(--([\w-]+)\);--lower:var\(--([\w-]+)\)"', text)
    assert len(found) == text.count('<li class="')
    return found


def test_a_strip_has_a_colour_a_patch_size_and_the_last_in_pale_where_a_step_is_reused():
    found = cells(markup.strip([POWERFUL, REUSED, WEAK, REUSED, ("1x4x4-guided",) * 2], SIZES))
    assert found == [
        ("computed", "patch-0", "patch-0"),
        ("reused", "pale-0", "pale-0"),
        ("computed", "patch-2", "patch-2"),
        ("reused", "pale-2", "pale-2"),
        ("computed", "patch-1", "patch-1"),
    ]


def test_guidance_branches_that_differ_share_a_cell():
    found = cells(markup.strip([POWERFUL, ("1x4x4", "kept"), ("1x2x2", "2x4x4"), ("1x4x4",)], SIZES))
    halves = [("patch-0", "patch-0"), ("patch-2", "held"), ("patch-0", "patch-3"), ("patch-2", "patch-2")]
    assert [cell[1:] for cell in found] == halves


def test_a_plan_in_words():
    text = markup.plan_markup(plan_of(POWERFUL, REUSED, POWERFUL, REUSED, share=0.5))
    assert ">50 %<" in text and ">2 TFLOP of 4 TFLOP<" in text and "2 of 4 steps computed" in text
    assert "would buy 2 plain steps" in text
    assert "1x2x2<b>2</b>" in text and "reused<b>2</b>" in text and "2x4x4" not in text
    assert "would buy 1 plain step<" in markup.plan_markup(plan_of(POWERFUL, REUSED, REUSED, REUSED))
    below = plan_of(POWERFUL, REUSED, REUSED, REUSED, share=0.2)
    assert "less than 1 plain step costs<" in markup.plan_markup(below)


def test_nothing_that_is_typed_becomes_markup():
    for text in (markup.refusal_markup("no word <script>"), markup.note_markup("no word <script>")):
        assert "<script>" not in text and "&lt;script&gt;" in text
    arm = Arm("flexivid", 2, 1, 0.5, Path('a"b.mp4'), Path("c<d.mp4"), Path("e.json"))
    assert 'a"b' not in markup.arms_markup(plan_of(POWERFUL, REUSED), {"flexivid": arm}, "1/1")
    assert "c<d" not in markup.downloads_markup(arm)


def test_clips_wait_are_sampled_and_are_there():
    plan, arm = plan_of(POWERFUL, REUSED), Arm("flexivid", 2, 10**12, 1.234, Path("a.mp4"))
    idle, queued, begun, one = (
        markup.arms_markup(plan, done, "4/3", progress)
        for done, progress in (({}, "idle"), ({}, "queued"), ({}, "sampling"), ({"flexivid": arm}, "sampling"))
    )
    assert idle.count('"screen"') == 3 and "--ratio:4/3" in idle and queued.count("screen waiting") == 3
    assert "FLOP " not in idle and "1 of 2 computed" in queued and "4 TFLOP <small>100 %" in queued
    assert begun.count("screen sampling") == 1 and begun.count("screen waiting") == 2
    assert one.count("<video") == 1 and "1.23 s" in one and one.count("screen sampling") == 1
    order = re.findall('data-arm="(.*?)"', one)
    assert order == ["full", "fewer", "flexivid"] and one.index("sampling") < one.index("<video")


def arguments_of(model: Path | None, *words: str) -> tuple[argparse.Namespace, object]:
    """A clip's arguments, completed, and the pipeline without weights."""
    sizes = "--steps 4 --frames 9 --height 64 --width 96 --fps 4" if model else "--steps 4"
    chosen = ["--model", str(model)] if model else []
    arguments = app.parse_arguments([*sizes.split(), *chosen, "--budget", "0.8", *words, "--device", "cpu"])
    check_model_and_adapter(arguments)
    return arguments, check_with_model(arguments)


@pytest.fixture(scope="module")
def embedded() -> tuple[argparse.Namespace, Planner]:
    arguments, empty = arguments_of(None)
    return arguments, Planner(empty, arguments)


@pytest.fixture(scope="module", params=["wan", "ltx"])
def model(request, tmp_path_factory):
    """Of a family that calls its guidance branches apart, and of one that has both in one call."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "wan":
        tiny_pipeline().save_pretrained(folder)
    else:
        with_text(LTXPipeline.from_pipe(tiny_image_pipeline("ltx-i2v", text_length=226)[0])).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("order", ["reuse", "interleaved"])
def test_what_is_planned_is_what_runs(model, tmp_path, order):
    arguments, empty = arguments_of(model, "--order", order)
    pipe, seconds = load_pipeline(arguments, type(empty))
    plan = Planner(empty, arguments).plan(0.6, 4)
    arms = list(Sampler(pipe, arguments, seconds, tmp_path).run(CAPTION, 0.6, plan, 3))
    assert [arm.name for arm in arms] == list(sampler.ARMS) and [arm.steps for arm in arms] == [4, plan.fewer_steps, 4]
    ours, fewer, full = (arm.flops for arm in arms)
    record = json.loads(arms[0].record.read_text())
    assert (ours, full) == (plan.flops_used, plan.flops_full) == (record["flops"]["used"], record["flops"]["full"])
    assert 0 < fewer <= ours <= 0.6 * full
    assert record["schedule"] == plan.schedule.to_json() and (record["seed"], record["budget"]) == (3, 0.6)
    assert all(arm.shown.stat().st_size for arm in arms) and arms[0].clip.stat().st_size


@pytest.fixture(scope="module")
def recipe() -> tuple[argparse.Namespace, object, Planner]:
    """Of the embedded model's few-step adapter."""
    arguments = app.parse_arguments(["--adapter", str(FEW_ADAPTER), "--device", "cpu"])
    check_model_and_adapter(arguments)
    empty = check_with_model(arguments)
    return arguments, empty, Planner(empty, arguments)


def test_a_recipe_is_planned_and_runs_beside_the_usual_full_run(recipe, tmp_path, monkeypatch):
    arguments, empty, planner = recipe
    plan = planner.plan(None, 4)
    assert plan.schedule.to_json() == [[patch_size] for patch_size in read_config(FEW_ADAPTER).recipe.patch_sizes]
    assert (plan.steps, plan.full_steps) == (4, 40) and 0.005 < plan.share < 4 / 80
    pipe, seconds = load_pipeline(arguments, type(empty))
    runs = Sampler(pipe, arguments, seconds, tmp_path).run(CAPTION, None, plan, 3)
    ours = next(runs)
    record = json.loads(ours.record.read_text())
    assert ours.flops == plan.flops_used == record["flops"]["used"] and plan.flops_full == record["flops"]["full"]
    assert record["budget"] is None and record["schedule"] == plan.schedule.to_json()

    def generate(pipe, arguments, prompt, **changed):
        asked.append((arguments.steps, arguments.guidance_scale))
        return Clip(np.zeros((5, 32, 32, 3), "uint8")), {"denoise": 1.0}

    asked = []
    monkeypatch.setattr(sampler, "generate", generate)
    fewer, full = runs
    assert asked == [(plan.fewer_steps, 4.0), (40, 4.0)] and full.flops == plan.flops_full
    assert fewer.flops == plan.flops_full * plan.fewer_steps // 40
    markup_ = markup.arms_markup(plan, {}, "1/1", "queued")
    assert "<dd>40</dd>" in markup_ and "<dd>4 of 4 computed</dd>" in markup_


def test_a_dial_that_moves_samples_no_stock_clip_again(embedded, tmp_path, monkeypatch):
    arguments, sampled = embedded[0], []

    def generate(pipe, arguments, prompt, **changed):
        sampled.append((prompt, arguments.steps, arguments.seed))
        return clip, {"denoise": float(len(sampled))}

    clip = Clip(np.zeros((5, 32, 32, 3), "uint8"))
    monkeypatch.setattr(sampler, "generate", generate)
    monkeypatch.setattr(sampler, "enable_and_check", lambda *_: None)
    monkeypatch.setattr(sampler, "record_of", lambda *_: {})
    monkeypatch.setattr(sampler.flexivid, "summary", lambda _: SimpleNamespace(flops_used=1))
    monkeypatch.setattr(sampler.flexivid, "disable", lambda _: None)
    page = Sampler(None, arguments, 1.0, tmp_path)
    plans = {share: plan_of(*[POWERFUL] * 4, share=share) for share in (0.25, 0.5)}
    seconds = [[arm.seconds for arm in page.run(CAPTION, share, plans[share], 0)] for share in (0.25, 0.5, 0.25)]
    # flexivid each time, 1 and 4 plain steps at first, then 2, then nothing else.
    assert [steps for _, steps, _ in sampled] == [4, 1, 4, 4, 2, 4]
    assert [line[2] for line in seconds] == [3.0] * 3
    list(page.run(CAPTION, 0.25, plans[0.25], 1))
    assert len(sampled) == 9


def test_files_of_the_last_runs_only_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sampler, "KEPT_RUNS", 2)
    runs = Sampler(None, SimpleNamespace(), 1.0, tmp_path)
    folders = []
    for moment in range(5):
        folders.append(runs._new_folder())
        os.utime(folders[-1], (moment, moment))
        assert set(tmp_path.iterdir()) == set(folders[-3:])


def test_the_dial_follows_budget_and_steps_and_names_the_least(embedded):
    planner = embedded[1]
    quarter, half = planner.plan(0.25, 40), planner.plan(0.5, 40)
    assert quarter.flops_used <= 0.25 * quarter.flops_full < half.flops_used <= 0.5 * half.flops_full
    assert quarter.flops_full == half.flops_full == 2 * planner.plan(1, 20).flops_full
    assert (quarter.fewer_steps, half.fewer_steps) == (10, 20)
    with pytest.raises(BudgetError, match="the least is 0.013"):
        planner.plan(0.01, 40)
    assert planner.plan(0.013, 40).share <= 0.013


def test_guided_patch_sizes_are_planned_for_their_guidance_scale_only():
    for words, guided in (([], True), (["--guidance-scale", "5"], False)):
        arguments, empty = arguments_of(None, *words)
        steps = Planner(empty, arguments).plan(0.1, 40).schedule.steps
        assert any(step[0].endswith("-guided") for step in steps) == guided


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--budget 0", "--budget must be a number above 0"),
        ("--port 0", "--port must be a number from 1 to 65535, not 0"),
        ("--port page", "not page"),
        ("--host 203.0.113.1", "nothing can be served at 203.0.113.1"),
        ("--steps 2 --budget 0.01", "the least is"),
        (f"--adapter {FEW_ADAPTER} --steps 5", "the recipe of this adapter has 4 steps, not 5"),
        ("--steps 300", "steps must be at most 200 on this page, not 300"),
        ("--model nowhere/at/all", "no model_index.json"),
        ("--adapter nowhere/at/all", "nowhere/at/all"),
        ("--frames 10", "such as 9"),
    ],
)
def test_a_start_that_is_refused(words, said, capsys, monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda name: True)
    monkeypatch.setattr(app, "load_pipeline", lambda *_: pytest.fail("weights were read"))
    assert app.main([*words.split(), "--device", "cpu"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_a_start_without_gradio_or_with_a_port_that_is_taken(capsys, monkeypatch):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    assert app.main([]) == 2 and 'pip install "flexivid[app]"' in capsys.readouterr().err
    monkeypatch.setattr(app, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert app.main(["--port", str(taken)]) == 2
    assert f"nothing can be served at 127.0.0.1, port {taken}" in capsys.readouterr().err


@needs_gradio
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "  "}, "The prompt is empty"),
        ({"steps": None}, "Steps must be at least 1, a whole number below 10**9, not nothing"),
        ({"steps": 2.5}, "not 2.5"),
        ({"steps": 0}, "not 0"),
        ({"steps": 201}, "at most 200 on this page, not 201"),
        ({"seed": -1}, "The seed must be 0 or more"),
        ({"seed": None}, "The seed must be"),
        ({"budget": 0.0}, "Budget must be a number above 0"),
        ({"budget": 0.005}, "the least is 0."),
        ({"budget": None}, "Budget must be a number above 0"),
    ],
)
def test_what_the_page_refuses(embedded, given, said):
    from flexivid.app.page import Page

    arguments, planner = embedded
    page = Page(planner, Sampler(None, arguments, 1.0, None), arguments)
    asked, text, *_ = page.ask(*({"prompt": CAPTION, "budget": 0.5, "steps": 4, "seed": 0} | given).values())
    assert asked is None and said in text and 'role="alert"' in text
    if not given.keys() & {"prompt", "seed"}:
        text, button = page.move_dial(*({"budget": 0.5, "steps": 4} | given).values())
        assert said in text and button.interactive is False


@needs_gradio
def test_the_page_of_a_recipe_has_no_dial(recipe):
    from flexivid.app.page import Page

    arguments, _, planner = recipe
    page = Page(planner, Sampler(None, arguments, 1.0, None), arguments)
    parts = page.build().config["components"]
    texts = " ".join(str(part["props"].get("value")) for part in parts)
    assert "The recipe of this adapter</b> sets 4 steps and turns guidance off. " in texts
    assert "The full run has 40 steps, and a guidance scale of 4." in texts and "by the recipe of a" in texts
    assert not [part for part in parts if part["type"] == "slider"]
    assert [part["props"]["interactive"] for part in parts if part["props"].get("elem_id") == "steps"] == [False]
    asked, text, *_ = page.ask(CAPTION, None, 5, 0)
    assert asked is None and "The recipe of this adapter has 4 steps, not 5" in text


# The page as people start it: one command, the embedded model. Fewer steps than usual, for the time they take.


@contextmanager
def served(root: Path, *words: str) -> Iterator[str]:
    """The address of a page. root: for its log and its files, of which none may stay."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "flexivid", "app", "--device", "cpu", "--port", str(port), *words]
    log, files, where = root / "log.txt", root / "files", f"http://127.0.0.1:{port}/"
    files.mkdir()
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(files)}
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=ROOT, env=offline, stdout=output, stderr=output) as server,
    ):

        def is_up():
            assert server.poll() is None, log.read_text()
            try:
                return urlopen(where).status == 200
            except OSError:  # nobody listens yet
                return False

        try:
            wait_for(is_up, "the page", 300)
            yield where
        finally:
            server.terminate()
            server.wait(60)
    assert server.returncode == 0 and "Traceback" not in log.read_text()
    assert not list(files.glob("flexivid-*"))


@contextmanager
def opened(address: str, profile: Path) -> Iterator:
    with browser_at(address, profile) as driver:
        wait_for(lambda: driver.find_elements(By.CSS_SELECTOR, "#sample"), "the page to be drawn", 60)
        yield driver


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("server"), "--steps", "8") as where:
        yield where


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    with opened(address, tmp_path_factory.mktemp("profile")) as driver:
        yield driver


in_browser = [pytest.mark.slow, needs_gradio, needs_browser]


def text_of(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)


def planned_share(browser) -> float:
    """In percent, 0 where nothing is planned."""
    return float(text_of(browser, "#planned-share").removesuffix(" %") or 0)


def move_dial(browser, budget: float) -> None:
    browser.execute_script(
        "const dial = document.querySelector('#budget input[type=range]'); dial.value = arguments[0];"
        "dial.dispatchEvent(new Event('input', {bubbles: true}));"
        "dial.dispatchEvent(new Event('change', {bubbles: true}))",
        budget,
    )


def type_into(browser, selector: str, text: str) -> None:
    field = browser.find_element(By.CSS_SELECTOR, selector)
    field.clear()
    field.send_keys(text)


def videos(browser) -> list[dict]:
    return browser.execute_script(
        "return [...document.querySelectorAll('.arm video')].map(v => ({arm: v.closest('.arm').dataset.arm, "
        "time: v.currentTime, width: v.videoWidth, shown: v.clientWidth, error: v.error && v.error.message}))"
    )


def picture(browser, name: str) -> None:
    if folder := os.environ.get("FLEXIVID_SCREENSHOTS"):
        browser.save_screenshot(os.path.join(folder, f"app-{name}.png"))


@pytest.mark.usefixtures("address")
class TestInABrowser:
    pytestmark = in_browser

    def test_the_dial_changes_flops_and_strip_without_sampling(self, browser):
        assert 12 < planned_share(browser) <= 25 and text_of(browser, "h1") == "flexivid"
        before = text_of(browser, "#planned-flops")
        picture(browser, "begin")
        move_dial(browser, 0.5)
        wait_for(lambda: 37 < planned_share(browser) <= 50, "the plan to follow the dial")
        assert text_of(browser, "#planned-flops") != before
        kinds = [cell.get_attribute("class") for cell in browser.find_elements(By.CSS_SELECTOR, ".strip li")]
        assert len(kinds) == 8 and f"{kinds.count('computed')} of 8 steps computed" in text_of(browser, "#plan")
        assert videos(browser) == []

    def test_a_budget_that_cannot_be_reached_shows_the_least(self, browser):
        move_dial(browser, 0.01)
        wait_for(lambda: "cannot be reached" in text_of(browser, "#plan"), "the refusal")
        least = re.search(r"the least is ([\d.]+)", text_of(browser, "#plan"))[1]
        assert not browser.find_element(By.ID, "sample").is_enabled()
        picture(browser, "refused")
        move_dial(browser, math.ceil(200 * float(least)) / 200)  # the next place of the dial
        wait_for(lambda: "computed" in text_of(browser, "#plan"), "a plan again")
        assert browser.find_element(By.ID, "sample").is_enabled()

    def test_it_samples_all_three_and_plays_them_in_step(self, browser, address):
        move_dial(browser, 0.25)
        wait_for(lambda: 12 < planned_share(browser) <= 25, "the plan")
        browser.find_element(By.ID, "sample").click()
        wait_for(lambda: text_of(browser, ".screen.sampling"), "the sampling to begin")
        # The dial is free meanwhile.
        move_dial(browser, 0.75)
        wait_for(lambda: planned_share(browser) == 75, "the plan beside the sampling")
        assert len(videos(browser)) < 3
        playing = wait_for(
            lambda: len(found := videos(browser)) == 3 and all(v["time"] > 0.3 for v in found) and found,
            "three clips to play",
            240,
        )
        assert [video["arm"] for video in playing] == ["full", "fewer", "flexivid"]
        assert all(video["width"] == 384 and video["shown"] > 300 and video["error"] is None for video in playing)
        assert max(video["time"] for video in playing) - min(video["time"] for video in playing) < 0.2
        wait_for(lambda: all(v["time"] > 1.5 for v in videos(browser)), "the end")
        wait_for(lambda: all(v["time"] < 1.0 for v in videos(browser)), "the beginning")
        for arm, most in (("full", 100), ("fewer", 25), ("flexivid", 25)):
            figures = re.search(r"FLOP ([\d.]+) %denoising([\d.]+) s", text_of(browser, f"[data-arm={arm}] dl"))
            assert most / 2 <= float(figures[1]) <= most and float(figures[2]) > 0
        picture(browser, "sampled")

    def test_clip_and_record_can_be_taken_away(self, browser, address):
        links = browser.find_elements(By.CSS_SELECTOR, ".downloads a")
        clip, record = (urlopen(urljoin(address, link.get_attribute("href"))).read() for link in links)
        assert clip[4:8] == b"ftyp" and [link.get_attribute("download") for link in links] == [
            "flexivid.mp4",
            "flexivid.json",
        ]
        record = json.loads(record)
        assert record["flops"]["ratio"] <= record["budget"] == 0.25 and record["steps"] == 8
        assert record["model"] == "embedded" and len(record["schedule"]) == 8

    def test_a_click_pauses_all(self, browser):
        browser.find_element(By.CSS_SELECTOR, ".arm video").click()
        stopped = [video["time"] for video in videos(browser)]
        browser.execute_async_script("setTimeout(arguments[0], 400)")
        assert [video["time"] for video in videos(browser)] == stopped
        browser.find_element(By.CSS_SELECTOR, ".arm video").click()
        wait_for(lambda: [video["time"] for video in videos(browser)] != stopped, "the clips to go on")

    def test_two_visitors_wait_for_each_other(self, browser, address):
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        browser.get(address)
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#sample"), "the second page", 60)
        tabs = [first, browser.current_window_handle]
        for tab, seed in zip(tabs, (1, 2), strict=True):
            browser.switch_to.window(tab)
            type_into(browser, "#seed input", str(seed))
            type_into(browser, "#steps input", "10")
            wait_for(lambda: "of 10 steps computed" in text_of(browser, "#plan"), "the plan of 10 steps")
            browser.find_element(By.ID, "sample").click()
        records = []
        for tab in tabs:
            browser.switch_to.window(tab)
            wait_for(lambda: len(videos(browser)) == 3 and not text_of(browser, ".screen.sampling"), "its clips", 240)
            href = browser.find_elements(By.CSS_SELECTOR, ".downloads a")[1].get_attribute("href")
            records.append(Path(href.partition("file=")[2]))
        assert [json.loads(path.read_text())["seed"] for path in records] == [1, 2]
        ends = [(path.parent / "full.mp4").stat().st_mtime for path in records]
        assert ends[0] < records[1].stat().st_mtime < ends[1]
        browser.close()
        browser.switch_to.window(first)

    def test_bad_input_is_said_in_the_page(self, browser):
        type_into(browser, "#seed input", "-3")
        browser.find_element(By.ID, "sample").click()
        wait_for(lambda: "The seed must be 0 or more" in text_of(browser, "#note"), "the refusal")
        type_into(browser, "#seed input", "0")

    def test_a_narrow_window_needs_no_scrolling_sideways(self, browser):
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": 420, "height": 900, "deviceScaleFactor": 2, "mobile": True}
        )
        wait_for(lambda: browser.execute_script("return innerWidth") == 420, "the narrow window")
        picture(browser, "narrow")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 420
        widths = {video["arm"]: video["shown"] for video in videos(browser)}
        assert widths["flexivid"] > 340 and min(widths.values()) > 150

    def test_nothing_is_asked_of_any_other_server(self, browser, address):
        sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requests = [message["params"] for message in sent if message["method"] == "Network.requestWillBeSent"]
        asked = [r["request"]["url"] for r in requests if r["documentURL"].startswith(address)]
        assert asked and [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.slow
@needs_gradio
@needs_browser
def test_the_page_of_a_few_step_adapter_in_a_browser(tmp_path):
    with (
        served(tmp_path, "--adapter", str(FEW_ADAPTER)) as address,
        opened(address, tmp_path / "profile") as browser,
    ):
        assert "sets 4 steps and turns guidance off" in text_of(browser, ".recipe")
        assert browser.find_elements(By.CSS_SELECTOR, "#budget") == []
        assert not browser.find_element(By.CSS_SELECTOR, "#steps input").is_enabled()
        assert "4 of 4 steps computed" in text_of(browser, "#plan") and 0 < planned_share(browser) < 5
        picture(browser, "recipe")
        browser.find_element(By.ID, "sample").click()
        wait_for(lambda: [v["width"] for v in videos(browser)] == [384] * 3, "three clips", 400)
        said = {arm: text_of(browser, f"[data-arm={arm}] dl") for arm in ("full", "flexivid")}
        assert said["full"].startswith("steps40") and said["flexivid"].startswith("steps4 of 4 computed")
        picture(browser, "recipe-sampled")
