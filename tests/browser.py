"""A real browser for tests of pages: headless Chromium, whose requests and complaints can be read."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium here: apt-get install chromium chromium-driver"
)
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SWITCHES += ["--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required"]
# Workers are held to a core each (conftest); a browser gets those of the process that started them.
CORES = os.sched_getaffinity(os.getppid()) if hasattr(os, "sched_getaffinity") else None


def on_all_cores():
    if CORES is not None:
        os.sched_setaffinity(0, CORES)


@contextmanager
def browser_at(address: str, profile: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for switch in [*SWITCHES, f"--user-data-dir={profile}", "--window-size=1400,1000"]:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER, popen_kw={"preexec_fn": on_all_cores})
    with webdriver.Chrome(options=options, service=service) as driver:
        driver.command_executor.client_config.timeout = 60  # seconds that a command may take
        driver.get(address)
        yield driver


def wait_for(condition, what: str, seconds: float = 20.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
    return found
