"""The site is built strictly, the notebook runs from end to end, the README's picture shows its figures."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest
from page_blocks import execute

from duallora import streams

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_site_has_no_broken_link_or_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Built as `make docs` builds it, but in this process, where the package has been imported."""
    sphinx = pytest.importorskip("sphinx.cmd.build", reason="the extra docs is not installed")
    monkeypatch.chdir(ROOT)
    site = tmp_path / "site"
    strictly = ["-W", "--keep-going", "-q", "-c", "docs/site", "-b", "html", "-d", str(tmp_path / "trees")]
    assert sphinx.build_main([*strictly, ".", str(site)]) == 0, capsys.readouterr().err
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (site / "docs").glob("*.html")}
    assert "tutorial" in (site / "searchindex.js").read_text(encoding="utf-8")
    reference = (site / "docs" / "site" / "api.html").read_text(encoding="utf-8")
    assert "ContinualLearner" in reference and "(n, row_dim)" in reference


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the extra report is not installed").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DUALLORA_BACKBONE", "embedded")
    monkeypatch.setenv("DUALLORA_IMAGES", "8")
    monkeypatch.setattr("duallora.training.epochs_for", lambda *given: 1)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    execute("\n".join("".join(cell["source"]) for cell in code), NOTEBOOK.name)
    assert Path("digits-model/model.json").exists()


def test_the_picture_of_the_readme_shows_what_was_measured() -> None:
    script = runpy.run_path(str(ROOT / "tools" / "readme_picture.py"), run_name="picture")
    stream = streams.split(streams.DigitsDataset(), script["LESSONS"], order_seed="alphabetical")
    drawn = script["drawn"](stream, {"duallora": [1.0, 0.97, 0.96], "lora": [0.9, 0.4, 0.31]})
    told = [element.text for element in ElementTree.fromstring(drawn).iter() if element.text]
    assert {"100 %", "97 %", "96 %", "90 %", "40 %", "31 %"} <= set(told)
    assert drawn.count("<image ") == sum(script["LESSONS"])
