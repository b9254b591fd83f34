"""A comparison whose other side is missing is skipped on a user's machine, and fails where the tests must be whole."""

import peers
import pytest
from peers import peer


def test_a_missing_package_is_a_skip(monkeypatch):
    monkeypatch.delenv("FASTDPO_PEERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no_such_package"):
        peer("no_such_package")


def test_a_missing_package_is_a_failure_where_peers_are_required(monkeypatch):
    monkeypatch.setenv("FASTDPO_PEERS", "required")
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        peer("no_such_package")


def test_a_package_without_a_release_for_this_python_is_a_skip_all_the_same(monkeypatch):
    monkeypatch.setenv("FASTDPO_PEERS", "required")
    monkeypatch.setitem(peers.OLDEST_PYTHON, "no_such_package", (99, 0))
    with pytest.raises(pytest.skip.Exception, match="no_such_package"):
        peer("no_such_package.part")


def test_make_test_and_so_ci_require_them():
    from pathlib import Path

    root = Path(__file__).parents[1]
    runs = [line for line in (root / "Makefile").read_text().splitlines() if "-m pytest" in line]
    assert runs
    assert all("FASTDPO_PEERS=required" in line for line in runs)
    assert (root / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"
