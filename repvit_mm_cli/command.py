"""``repvit-mm COMMAND``: the launchers of ``tools/``, from any folder."""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .doctor import package_folder

OF_A_CHECKOUT = ('setup_env',)
"""Programs in the same folder that are no commands."""


def tools_folder() -> Path:
    """Where the launchers are: inside the installed package, or beside it in a checkout.

    Exits with one line if they are nowhere.
    """
    package = package_folder()
    places = [package / '.mim' / 'tools', package.parent / 'tools'] if package else []
    for place in places:
        if (place / 'train.py').is_file():
            return place
    sys.exit('repvit-mm: repvit_mm is not installed with its tools: pip install --force-reinstall repvit_mm')


def commands() -> dict[str, Path]:
    """Name -> launcher, e.g. ``'check-data'`` -> ``tools/check_data.py``."""
    launchers = sorted(tools_folder().glob('*.py'))
    return {
        path.stem.replace('_', '-'): path
        for path in launchers
        if not path.stem.startswith('_') and path.stem not in OF_A_CHECKOUT
    }


def summary(launcher: Path) -> str:
    """The first line of a launcher's docstring, read without running it."""
    docstring = ast.get_docstring(ast.parse(launcher.read_text(encoding='utf-8'))) or ''
    return docstring.partition('\n')[0].partition(': python tools/')[0].rstrip('.')


def build_parser(names: dict[str, Path]) -> argparse.ArgumentParser:
    """The parser of the command's own arguments; what follows is the launcher's."""
    width = max(map(len, [*names, 'completion'])) + 2
    listing = [f'  {name:{width}}{summary(path)}' for name, path in names.items()]
    listing.append(f'  {"completion":{width}}Print the completion of this command for bash, zsh or tcsh')
    parser = argparse.ArgumentParser(
        prog='repvit-mm',
        usage='repvit-mm COMMAND [ARGUMENT ...]',
        description='RepViT, FastViT and MobileOne for MMDetection and MMSegmentation.',
        epilog='commands:\n' + '\n'.join(listing) + '\n\nrepvit-mm COMMAND --help tells what a command takes.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'repvit-mm {metadata.version("repvit_mm")}')
    parser.add_argument('command', metavar='COMMAND', choices=[*names, 'completion'], help='see below')
    return parser


def run(launcher: Path, name: str, arguments: Sequence[str]) -> None:
    """Run a launcher in this process as Python would run it."""
    sys.argv = [f'repvit-mm {name}', *arguments]
    sys.path.insert(0, str(launcher.parent))  # launchers share modules
    # runpy would put the launcher's path in the place of the command's name.
    spec = importlib.util.spec_from_file_location('__main__', launcher)
    module = importlib.util.module_from_spec(spec)
    module.__spec__ = None  # as in a program: spawned processes then load it by its path
    sys.modules['__main__'] = module
    spec.loader.exec_module(module)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    names = commands()
    # What follows the command is its own, --help too.
    chosen = build_parser(names).parse_args(arguments[:1]).command
    if chosen == 'completion':
        from .completion import print_completion

        print_completion(names, arguments[1:])
    else:
        run(names[chosen], chosen, arguments[1:])
