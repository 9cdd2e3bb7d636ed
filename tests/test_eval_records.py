import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.errors import QuantKitError
from quantkit.eval.records import current_commit, environment, read_records, write_records


def test_records_come_back_in_the_order_of_their_writing(tmp_path):
    path = tmp_path / "results" / "speed.jsonl"
    write_records(path, [{"us": 1.5, "note": None}, {"us": 2}])
    write_records(path, [{"us": 3}])
    assert read_records(path) == [{"us": 1.5, "note": None}, {"us": 2}, {"us": 3}]
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_records(path)


def test_nan_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "r.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        write_records(path, [{"us": 1.0}, {"us": float("nan")}])
    assert not path.exists()


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"us": 1}\n{"us": \n')
    with pytest.raises(QuantKitError, match=r"r\.jsonl:2: not JSON"):
        read_records(path)
    path.write_text("3\n")
    with pytest.raises(QuantKitError, match=r"r\.jsonl:1: int where an object"):
        read_records(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(QuantKitError, match=r"absent\.jsonl: no such file"):
        read_records(tmp_path / "absent.jsonl")


def test_the_environment_says_what_a_figure_depends_on():
    record = environment("cpu")
    assert set(record) == {"device", "torch", "triton", "transformers", "commit", "date"}
    assert record["torch"] == torch.__version__
    assert record["device"].endswith(f"{torch.get_num_threads()} threads")
    assert datetime.fromisoformat(record["date"]).utcoffset().total_seconds() == 0
    assert environment("cpu", commit="abc1234")["commit"] == "abc1234"
    json.dumps(record)


def test_the_commit_is_the_checkouts_own():
    root = Path(quantkit.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("not run from a git checkout")
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert head.startswith(current_commit())


def test_without_a_checkout_of_its_own_the_version_stands_for_the_commit(monkeypatch, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(quantkit, "__file__", str(tmp_path / "site-packages" / "quantkit" / "__init__.py"))
    (tmp_path / "site-packages").mkdir()
    assert current_commit() == quantkit.__version__
