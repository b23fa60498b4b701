"""Code revision and environment."""

from __future__ import annotations

import subprocess
from pathlib import Path

from train.facts import ROOT, code_revision, environment


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_a_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert code_revision(tmp_path, {}) == commit
    (tmp_path / "untracked").write_text("1")
    assert code_revision(tmp_path, {}) == commit
    (tmp_path / "a").write_text("2")
    assert code_revision(tmp_path, {}) == f"{commit}+changes"
    assert code_revision(tmp_path, {"FRONTIER_REVISION": "v7"}) == "v7"


def test_a_recipe_that_is_not_committed_is_a_change(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "one")
    recipes = tmp_path / "train" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "notes.txt").write_text("…")
    assert "+" not in code_revision(tmp_path, {})
    (recipes / "ridge.py").write_text("1")
    assert code_revision(tmp_path, {}).endswith("+changes")


def test_recipes_that_lie_elsewhere_count(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "ridge.py").write_text("1")
    environ = {"FRONTIER_REVISION": "v7", "FRONTIER_RECIPES": str(mine)}
    one = code_revision(tmp_path, environ)
    assert one.startswith("v7+recipes:")
    assert code_revision(tmp_path, environ) == one
    (mine / "ridge.py").write_text("2")
    assert code_revision(tmp_path, environ) != one


def test_a_copy_without_git(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.py").write_text("1")
    one = code_revision(tmp_path, {})
    assert one.startswith("sources:")
    assert code_revision(tmp_path, {}) == one
    (tmp_path / "train" / "a.py").write_text("2")
    assert code_revision(tmp_path, {}) != one
    (tmp_path / "REVISION").write_text("abc\n")
    assert code_revision(tmp_path, {}) == "abc"


def test_the_environment_can_make_the_run_again() -> None:
    facts = environment("cpu")
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["device"] == "cpu"
    assert facts["python"].startswith("3.")
    assert (ROOT / "train" / "facts.py").exists()
