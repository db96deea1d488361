"""The browser of the tests sees what is wrong with a page, so that its silence about a report means something."""

import pytest
from chromium import Browser, needs_chromium

pytestmark = needs_chromium
PIXEL = 'data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=='


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp('profile')) as browser:
        yield browser


def show(browser, tmp_path, body, width=390):
    page = tmp_path / 'page.html'
    head = '<meta name="viewport" content="width=device-width"><title>t</title>'
    page.write_text(f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>')
    browser.open(page, width, mobile=True)


def test_a_sound_page_has_no_problems(browser, tmp_path):
    show(browser, tmp_path, f'<p>text</p><img src="{PIXEL}" alt="dot">')
    assert browser.problems == []
    assert browser.evaluate('document.images[0].naturalWidth') == 1
    assert browser.evaluate('window.innerWidth') == 390


@pytest.mark.parametrize(
    'body, said',
    [
        ('<script>console.error("bad")</script>', 'bad'),
        ('<script>throw new Error("thrown")</script>', 'Uncaught'),
        ('<img src="missing.png" alt="">', 'ERR_FILE_NOT_FOUND'),
        ('<img src="http://127.0.0.1:9/x.png" alt="">', '127.0.0.1:9'),
    ],
)
def test_problems_are_seen(browser, tmp_path, body, said):
    show(browser, tmp_path, body)
    assert any(said in problem for problem in browser.problems)
