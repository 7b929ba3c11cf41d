"""Build hook: configs, tools and the model index travel with the package, under `repvit_mm/.mim`.

MMEngine (`_base_ = 'repvit_mm::...'`) and MIM look for them there. All metadata is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = (Path('configs'), Path('tools'), Path('model-index.yml'))
# The checkout's own set-up program has nothing to set up once the package is installed.
NOT_INSTALLED = ('__pycache__', 'setup_env.py')


class BuildWithResources(build_py):
    """Copy the resources into the build, or link to them from the source tree for an editable install."""

    def run(self):
        super().run()
        mim = Path('repvit_mm' if self.editable_mode else f'{self.build_lib}/repvit_mm', '.mim')
        # What an earlier build left there may have been renamed or deleted since.
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for resource in RESOURCES:
            if self.editable_mode:
                (mim / resource).symlink_to(Path('../..', resource))
            elif resource.is_dir():
                shutil.copytree(resource, mim / resource, ignore=shutil.ignore_patterns(*NOT_INSTALLED))
            else:
                shutil.copy2(resource, mim / resource)

    def get_source_files(self):
        """Name the resources too, so that a source archive holds them."""
        files = (path for resource in RESOURCES for path in (resource, *resource.rglob('*')) if path.is_file())
        return super().get_source_files() + [str(path) for path in files if '__pycache__' not in path.parts]


setup(cmdclass={'build_py': BuildWithResources})
