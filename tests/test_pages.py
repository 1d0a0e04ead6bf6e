"""README and docs/: what they name is there, the commands they show are commands, and the notebook runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from typer.main import get_command

from dist_ssl import config as configuration
from tests.terminal import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        found = page.parent / path if path else page
        assert found.exists(), link
        headings = re.findall(r"^#+ (.*)", found.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, link
    for name in re.findall(r"\b(?:tests|dist_ssl|launch|configs|docs|docker)/[\w./*-]*\w", text):
        assert any(ROOT.glob(name)), name
    for module in re.findall(r"python -m ((?:tests|launch)\.[a-z_.]+)\b(?!\.?[A-Z])", text):
        assert any(ROOT.glob(f"{module.replace('.', '/')}*")), module


def commands(text: str) -> list[list[str]]:
    """Whole command lines of dist-ssl and of the launchers, in blocks and between backquotes."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        found += block.replace("\\\n", " ").splitlines()
    found += re.findall(
        r"`((?:dist-ssl|python -m launch\.\w+) [^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    )
    return [shlex.split(line, comments=True) for line in found if re.match(r"dist-ssl |python -m launch\.\w+ \w", line)]


def test_the_commands_that_pages_show_have_these_options() -> None:
    from launch import command, local, slurm

    apps: dict[str, Any] = {"launch.local": get_command(local.app), "launch.slurm": get_command(slurm.app)}
    apps["dist-ssl"] = get_command(command.app)
    seen = 0
    for page in PAGES:
        for program, *arguments in commands(page.read_text()):
            if program == "python":
                program, arguments = arguments[1], arguments[2:]
            node = apps[program]
            while hasattr(node, "commands"):
                node, arguments = node.commands[arguments[0]], arguments[1:]
            known = {option for parameter in node.params for option in parameter.opts + parameter.secondary_opts}
            if program == "launch.local":  # it passes on what it does not know
                known |= {o for parameter in apps["dist-ssl"].commands[node.name].params for o in parameter.opts}
            said = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")} - {"--help"}
            assert said <= known, f"{page.name}: {program} {node.name}: {said - known}"
            settings = [value for option, value in itertools.pairwise(arguments) if option == "--set"]
            settings = [one for one in settings if re.match(r"\w+\.", one) and "NAME" not in one]
            (file,) = [one for one in arguments if re.fullmatch(r"configs/\w+\.toml", one)] or [
                "configs/quickstart.toml"
            ]
            configuration.load(ROOT / file, settings)
            seen += 1
    assert seen > 40


def test_the_configs_that_pages_show_are_configs() -> None:
    blocks = [block for page in PAGES for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert blocks
    for block in blocks:
        configuration.validate(tomllib.loads(block), "a page")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # jupyter's own: event loops, a debugger's frozen modules
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DIST_SSL_WRITE_NOTEBOOK=1 keeps what it shows in docs/."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(NOTEBOOK, 4)
    options = {"kernel_name": "python3", "record_timing": False, "resources": {"metadata": {"path": tmp_path}}}
    NotebookClient(notebook, timeout=400, **options).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/jpeg" in output.get("data", {}) for output in shown) == 3
    assert sum("text/html" in output.get("data", {}) for output in shown) == 4
    (results,) = (tmp_path / "runs" / "notebook" / "run" / "evaluation").glob("step-12/results.json")
    assert set(json.loads(results.read_text())["probes"]) == {"linear", "knn"}
    if "DIST_SSL_WRITE_NOTEBOOK" in os.environ:
        for cell in notebook.cells:
            if cell.cell_type == "code":  # warnings of packages name this machine's paths
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, NOTEBOOK)
