"""The report, opened in a real browser: on a phone, on a desk and on paper."""

import pytest
from chromium import Browser, needs_chromium
from example_results import write_model

from mmadvmoe.report import read_results, write_report

pytestmark = needs_chromium


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    write_model(folder / 'advmoe', 'AdvMoE')
    write_model(folder / 'vit', 'ViT-MoE <tokens>', 'token', 4, ('layers.0.ffn', 'layers.1.ffn'), ra=20.0)
    write_model(folder / 'dense', 'AT(Dense)', None, ra=40.0)
    return write_report(folder, [read_results(folder / name) for name in ('advmoe', 'vit', 'dense')])


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp('profile')) as browser:
        yield browser


@pytest.mark.parametrize('width, mobile', [(390, True), (1200, False)])
def test_all_figures_are_there_and_nothing_goes_wrong(report, browser, width, mobile):
    browser.open(report, width, mobile=mobile)
    assert browser.problems == []
    pictures = browser.evaluate(
        '[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.clientHeight, i.alt.length])'
    )
    assert len(pictures) == len(list((report.parent / 'figures').iterdir())) > 30
    for complete, natural_width, shown_width, shown_height, alt in pictures:
        assert complete and natural_width > 400
        assert 0 < shown_width <= width and shown_height > 0
        assert alt > 30


def test_nothing_reaches_over_the_edge_of_a_phone(report, browser):
    browser.open(report, 390, mobile=True)
    assert browser.evaluate('window.innerWidth') == 390
    assert browser.evaluate('document.documentElement.scrollWidth') == 390
    # Wide tables and long lines of a config scroll within themselves.
    reaching = """[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > 390
        && !e.closest('.table, pre')).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.evaluate(reaching) == []
    assert browser.evaluate("getComputedStyle(document.querySelector('p')).fontSize") == '16px'


def test_each_section_can_be_reached(report, browser):
    browser.open(report, 1200)
    links = browser.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))")
    expected = ['facts', 'summary', 'curves', 'dissection', 'load', 'images', 'patches', 'soundness', 'training']
    expected.append('settings')
    assert links == expected
    assert browser.evaluate("[...document.querySelectorAll('section')].map(s => s.id)") == expected


def test_names_are_text_and_not_markup(report, browser):
    browser.open(report, 1200)
    assert browser.evaluate("document.querySelectorAll('tokens').length") == 0
    assert 'ViT-MoE <tokens>' in browser.evaluate("document.querySelector('h1').textContent")


def test_on_paper_no_table_is_cut_off(report, browser, tmp_path):
    # A4 without margins of 15 mm is 680 CSS pixels wide.
    browser.open(report, 680)
    browser.call('Emulation.setEmulatedMedia', media='print')
    cut = "[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > 680).length"
    assert browser.evaluate(cut) == 0
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == 'none'
    browser.call('Emulation.setEmulatedMedia', media='')
    browser.print(tmp_path / 'report.pdf')
    assert (tmp_path / 'report.pdf').read_bytes().startswith(b'%PDF')
