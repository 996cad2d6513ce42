"""The report of the benchmarks: what was contributed comes out as tables, and into README.md only where a place is marked."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks import results

    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(results, "README", tmp_path / "README.md")
    return results


def test_what_was_contributed_is_written_with_versions(results: ModuleType) -> None:
    """The peers come before our own figures, whichever was measured last."""
    results.contribute("hot_paths_core", [results.Section(title="Ours", header=["", "us"], rows=[["core", "7.0"]])])
    results.contribute("peer_costs", [results.Section(title="Peers", header=["", "us"], rows=[["them", "70"]], note="So it is.")])
    assert results.main([]) == 0
    text = results.RESULTS.read_text(encoding="utf-8")
    assert text.index("## Peers") < text.index("## Ours")
    assert "|  | us |\n|---|---:|\n| them | 70 |\n\nSo it is.\n" in text
    assert "clevagent 0." in text
    assert str(results.FOLDER.parent) not in text


def test_the_readme_changes_only_between_its_markers(results: ModuleType) -> None:
    """Run twice, it is the same."""
    section = results.Section(title="T", header=["", "x"], rows=[["a", "1"]], marker="overshoot")
    results.contribute("peer_ceilings", [section])
    results.README.write_text("before\n<!-- overshoot -->\nold\n<!-- /overshoot -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert results.main(["--readme"]) == 0
        assert results.README.read_text(encoding="utf-8") == (
            "before\n<!-- overshoot -->\n|  | x |\n|---|---:|\n| a | 1 |\n<!-- /overshoot -->\nafter\n"
        )


def test_what_was_not_measured_again_stays(results: ModuleType) -> None:
    """On a clone where only one benchmark was run, the tables of the others are kept, in their places."""
    results.contribute("a", [results.Section(title=title, header=["", "x"], rows=[["a", "1"]]) for title in ("One", "Two")])
    assert results.main([]) == 0
    (results.FOLDER / "a.json").unlink()
    new = [results.Section(title=title, header=["", "x"], rows=[["a", "2"], ["b", "3"]]) for title in ("Three", "One")]
    results.contribute("b", new)
    assert results.main([]) == 0
    found = results.tables(results.RESULTS.read_text(encoding="utf-8"))
    assert found == {"One": [["a", "2"], ["b", "3"]], "Two": [["a", "1"]], "Three": [["a", "2"], ["b", "3"]]}
    assert list(found) == ["One", "Two", "Three"]
    text = results.RESULTS.read_text(encoding="utf-8")
    assert results.main([]) == 0
    assert results.RESULTS.read_text(encoding="utf-8") == text


def test_a_readme_without_the_place_is_refused(results: ModuleType) -> None:
    """Rather than leaving old figures standing."""
    section = results.Section(title="T", header=["", "x"], rows=[["a", "1"]], marker="overshoot")
    with pytest.raises(ValueError, match="<!-- overshoot -->"):
        results.between_markers("nothing here", section)


def test_nothing_measured_is_said(results: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """And the report of an earlier run stays."""
    results.RESULTS.write_text("kept", encoding="utf-8")
    assert results.main([]) == 1
    assert "make bench" in capsys.readouterr().err
    assert results.RESULTS.read_text(encoding="utf-8") == "kept"
