"""Links between the documents lead somewhere, and the site has every page."""

import re
from pathlib import Path

import pytest
import yaml
from stacks import README, STACKS, with_table

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])
FENCE = re.compile(r'^(```+).*?^\1$', re.M | re.S)
LINK = re.compile(r'\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)')


def anchors(page: Path) -> set[str]:
    """The names by which headings of a page can be linked to, as GitHub and the site make them."""
    headings = re.findall(r'^#+ (.+)$', FENCE.sub('', page.read_text()), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for path, anchor in LINK.findall(FENCE.sub('', page.read_text())):
        target = page.parent / path if path else page
        assert target.exists(), f'{path} is not there'
        assert target.resolve().is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f'{path} has no heading #{anchor}'


def test_site_lists_every_page():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    # README.md, docs/README.md and CONTRIBUTING.md have other names there.
    moved = ['index.md', 'contents.md', 'contributing.md']
    expected = moved + [path.name for path in ROOT.glob('docs/*.md') if path.name != 'README.md']
    listed = pages(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav'])
    assert sorted(listed) == sorted(expected)


def test_readme_is_short():
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 120


def test_readme_tells_the_stacks():
    assert with_table(README.read_text()) == README.read_text()
    assert {path.stem for path in ROOT.glob('requirements/*.txt')} == set(STACKS)
