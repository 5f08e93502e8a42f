"What all tests share: where ../shared is, a browser, and that in CI nothing may be skipped."
import os
import shutil
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2]/'shared'

@pytest.fixture
def shared() -> Path:
    "The folder of goldens, real patients and published tables; skips where it is absent."
    if not SHARED.is_dir(): pytest.skip(f'{SHARED} is not there')
    return SHARED

@pytest.fixture(scope='session')
def browser():
    "Chromium, the system's own, driven by Playwright; skips where either is absent."
    api = pytest.importorskip('playwright.sync_api')
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    if not chromium: pytest.skip('no Chromium on this machine')
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield browser
        browser.close()

def pytest_sessionfinish(session, exitstatus):
    "In CI a skipped test is a failure: it was meant to run."
    reporter = session.config.pluginmanager.get_plugin('terminalreporter')
    skipped = reporter.stats.get('skipped', []) if reporter else []
    if os.environ.get('CI') and skipped and exitstatus == 0:
        reporter.write_line(f'{len(skipped)} skipped in CI, where every test is meant to run', red=True)
        session.exitstatus = 1
