"""The site's first page is README, and the files outside ``docs/`` that pages link to are part of the site."""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MOVED = {'README.md': 'index.md', 'docs/README.md': 'contents.md', 'CONTRIBUTING.md': 'contributing.md'}
"""Documents that have another place on the site, where ``docs/`` is the root."""

LINK = re.compile(r'(\]\()(?!\w+:|#)([^)#\s]+)')


def place(path: str) -> str:
    """Where a file of the repository is on the site."""
    if path in MOVED:
        return MOVED[path]
    return path.removeprefix('docs/') if path.startswith('docs/') else f'repository/{path}'


def linked(page: Path) -> set[str]:
    """The files that a page links to, as paths in the repository."""
    return {os.path.relpath(page.parent / path, ROOT) for _, path in LINK.findall(page.read_text(encoding='utf-8'))}


def for_site(page: Path) -> str:
    """A page's text with links as they are on the site."""
    folder = os.path.dirname(place(os.path.relpath(page, ROOT)))

    def moved(match: re.Match) -> str:
        target = place(os.path.relpath(page.parent / match[2], ROOT))
        return match[1] + os.path.relpath(target, folder or '.')

    return LINK.sub(moved, page.read_text(encoding='utf-8'))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace each page by its text for the site, and add what they link to."""
    pages = {ROOT / name for name in MOVED} | {DOCS / file.src_uri for file in files.documentation_pages()}
    for path in {path for page in pages for path in linked(page)}:
        if place(path).startswith('repository/') and (ROOT / path).is_file():
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    for page in pages:
        name = os.path.relpath(page, ROOT)
        if old := files.get_file_from_path(name.removeprefix('docs/')):
            files.remove(old)
        files.append(File.generated(config, place(name), content=for_site(page)))
    return files
