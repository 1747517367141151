"""The benchmarks run and agree at small sizes; how fast they are is for a quiet machine to say."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

ROOT = Path(__file__).parents[1]
BARS = {f"P{i}" for i in range(1, 15)} - {
    "P10"
}  # WinCLIP is measured on its own, benchmarks/winclip.py


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.slow
def test_quick_run_has_every_bar_and_all_agreements(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stdout + run.stderr
    table = pd.read_csv(tmp_path / "table.csv")
    assert set(table["id"]) == BARS
    assert set(table["verdict"]) == {"met", "not judged", "skipped"}
    agreements = table[table["verdict"] == "met"]
    assert {"P2", "P6", "P7", "P8", "P9", "P13", "P14"} <= set(agreements["id"])
    # P4 measures nothing where other memory is freed in the meantime
    skipped = table[(table["verdict"] == "skipped") & (table["id"] != "P4")]
    assert skipped["note"].str.contains("peers-python").all()
    text = (tmp_path / "table.md").read_text()
    assert f"torch {torch.__version__.split('+')[0]}" in text
    assert "load average" in text


def test_verdicts():
    from benchmarks.measure import Row

    assert Row("P0", "speed-up", 3.0, "x", 2, at_least=True).verdict() == "met"
    assert Row("P0", "speed-up", 3.0, "x", 4, at_least=True).verdict() == "missed"
    assert Row("P0", "cost", 3.0, "x", 2).verdict() == "missed"
    assert Row("P0", "cost", 3.0, "x", 2).verdict(quick=True) == "not judged"
    assert Row("P0", "difference", 3.0, "", 2, agreement=True).verdict(quick=True) == "missed"
    assert Row("P0", "difference", float("nan"), "", 2, agreement=True).verdict() == "missed"
    assert Row("P0", "peer", None, "x", 2).verdict() == "skipped"


def test_memory_is_counted():
    from benchmarks.measure import numpy_peak, torch_peak

    assert 8e6 <= numpy_peak(lambda: np.ones(1_000_000).sum()) < 8.2e6
    assert 8e6 <= torch_peak(lambda: (torch.ones(1_000_000) + 1).sum()) < 8.2e6


@pytest.mark.slow
def test_peers_that_fail_are_skipped_with_their_own_words():
    from benchmarks.metrics import Peers

    scores, masks = np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 4), bool)
    with (
        Peers(sys.executable, scores, masks) as peers,
        pytest.raises(RuntimeError, match="ModuleNotFoundError"),
    ):
        peers.run("adeval")
