"""Put the shipped plans and the embedded model, which lie outside the package, inside of it.

In the repository they are at the top, where a reader looks for them; an installed package carries
them as `sparse_dit/_profiles` and `sparse_dit/_tiny_wan`. `sparse_dit/resources.py` finds either.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
SHIPPED = {"_profiles": HERE / "profiles", "_tiny_wan": HERE / "demos" / "tiny_wan" / "model"}
IGNORED = shutil.ignore_patterns(".*", "__pycache__")


class BuildWithShippedFolders(build_py):
    """Copies the shipped folders into a wheel; an editable install reads the checkout's own."""

    def run(self) -> None:
        if self.editable_mode:
            super().run()
            return
        target = Path(self.build_lib) / "sparse_dit"
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left is not this wheel's
        super().run()
        for name, source in SHIPPED.items():
            if not source.is_dir():
                raise FileNotFoundError(f"the build needs the folder {source}: check it out again")
            shutil.copytree(source, target / name, ignore=IGNORED)


setup(cmdclass={"build_py": BuildWithShippedFolders})
