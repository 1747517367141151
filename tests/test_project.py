"""The files around the code say the same as the code."""

import importlib
import re
import tomllib
from pathlib import Path

import yaml

import clipad

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {
    "torch": "pytorch",
    "open-clip-torch": "open-clip-torch",
    "matplotlib": "matplotlib-base",
}


def split(requirement: str) -> tuple[str, str]:
    name, version = re.fullmatch(r"([A-Za-z0-9._-]+)\s*(.*)", requirement).groups()
    return name.lower().replace("_", "-"), version


def test_environment_and_pyproject_are_in_step():
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    conda = dict(split(entry) for entry in listed if isinstance(entry, str))
    assert conda.pop("python") == PROJECT["requires-python"]
    conda.pop("pip")
    pip = dict(split(entry) for entry in PROJECT["dependencies"])
    assert conda == {CONDA_NAMES.get(name, name): version for name, version in pip.items()}
    assert listed[-1] == {"pip": ["-e ."]}


def test_every_package_of_the_environment_has_a_reason():
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    packages = [
        line for line in lines if re.match(r"  - [a-z].*[<>=]", line) and "python>=" not in line
    ]
    assert packages
    assert all("  # " in line for line in packages)


def test_the_tested_versions_satisfy_the_requirements():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    extras = [entry for group in PROJECT["optional-dependencies"].values() for entry in group]
    for entry in PROJECT["dependencies"] + extras:
        requirement = Requirement(entry)
        name = requirement.name.lower().replace("_", "-")
        if entry in PROJECT["dependencies"] or name in pinned:
            assert requirement.specifier.contains(pinned[name]), entry


def test_public_names_exist():
    for module, names in clipad._HOME.items():
        for name in names:
            assert getattr(clipad, name) is getattr(
                importlib.import_module(f"clipad.{module}"), name
            )


def test_version_is_one():
    assert clipad.__version__ == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
