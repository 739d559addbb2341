"""What pip would do, asked without a network: metadata of the packages installed here, as an index of their own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def _write_dist_info(folder: Path, name: str, version: str, requires: Sequence[str]) -> dict[str, str]:
    """Metadata of a package without its code; returns what was written, path within the folder to text."""
    info = f"{canonicalize_name(name).replace('-', '_')}-{version}.dist-info"
    about = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    written = {
        f"{info}/METADATA": "\n".join([*about, *(f"Requires-Dist: {each}" for each in requires)]) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/INSTALLER": "pip\n",
    }
    digests = {path: hashlib.sha256(text.encode()).digest() for path, text in written.items()}
    encoded = {path: base64.urlsafe_b64encode(digest).rstrip(b"=").decode() for path, digest in digests.items()}
    written[f"{info}/RECORD"] = "".join(f"{path},sha256={each},\n" for path, each in encoded.items())
    for path, text in written.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return written


def make_python(folder: Path, packages: Mapping[str, str]) -> Path:
    """A Python that has these packages (name to version), as far as pip can tell."""
    venv.create(folder, with_pip=False)
    (site,) = folder.rglob("site-packages")
    for name, version in packages.items():
        _write_dist_info(site, name, version, [])
    return folder / "bin" / "python"


def make_index(folder: Path) -> Path:
    """Wheels without code of everything that is installed here, and of this project as its pyproject.toml is now."""
    index = folder / "index"
    index.mkdir()
    packages = {
        canonicalize_name(each.metadata["Name"]): (each.version, each.requires or ())
        for each in metadata.distributions()
    }
    packages[PROJECT["name"]] = (PROJECT["version"], PROJECT["dependencies"])
    for name, (version, requires) in packages.items():
        written = _write_dist_info(folder / "unpacked", name, version, requires)
        with zipfile.ZipFile(index / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as archive:
            for path, text in written.items():
                archive.writestr(path, text)
    return index


def pip(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run this environment's pip on another Python, which sees what is installed in it and nothing on a path."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def would_install(python: Path, index: Path, *arguments: str) -> dict[str, str]:
    """Names and versions that ``pip install`` would add or change, with nothing but the index to take them from.

    Raises:
        RuntimeError: pip finds no set of packages that fits; with what it says.
    """
    options = ("--dry-run", "--quiet", "--report", "-", "--no-index", "--find-links", str(index))
    done = pip(python, "install", *options, *arguments)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    return {canonicalize_name(each["name"]): each["version"] for each in found}
