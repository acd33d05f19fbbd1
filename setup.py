"""Everything is declared in pyproject.toml; here only that a build leaves nothing in the source folder."""

from tempfile import TemporaryDirectory

from setuptools import setup

with TemporaryDirectory() as scratch:
    setup(options={"build": {"build_base": scratch}, "egg_info": {"egg_base": scratch}})
