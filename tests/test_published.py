import dataclasses
import json

import pytest

from clipad import published
from clipad.published import data_dir, protocol, published_results


def test_results_are_fractions_with_source():
    table = published_results()
    assert " ".join(table.columns) == "method dataset category level metric value kind source"
    assert table["value"].between(0, 1).all()
    assert table.notna().all(axis=None)
    assert set(table["level"]) == {"image", "pixel"}
    assert set(table["metric"]) <= {"auroc", "f1_max", "ap", "pro"}
    assert set(table["kind"]) == {"published", "derived", "run by others"}
    assert not table.duplicated(["method", "dataset", "category", "level", "metric"]).any()


def test_results_of_one_method_on_one_data_set():
    table = published_results("mvtec").set_index(["method", "metric"])["value"]
    assert table["SDP+"].to_dict() == {"f1_max": 0.400, "pro": 0.851}
    assert table["WinCLIP"].iloc[0] == 0.918
    assert published_results(dataset="demo").empty


@pytest.mark.parametrize("call", [protocol, lambda name: published_results(dataset=name)])
def test_unknown_data_set_names_the_nearest(call):
    with pytest.raises(ValueError, match="'mvtec'"):
        call("MVTec-AD")
    with pytest.raises(ValueError, match=r"mvtec.*visa"):
        call("zzz")


@pytest.mark.parametrize("name", published.TRAINED_ON)
def test_protocol_is_cross_data_set(name):
    p = protocol(name)
    assert p.trained_on != name
    # They are shown in notebooks and stored with results.
    assert json.loads(json.dumps(dataclasses.asdict(p)))["rvs"] == "dbscan"


def test_protocol_differs_where_the_paper_differs():
    mvtec, visa = protocol("mvtec"), protocol("visa")
    assert mvtec.rvs_options == {"eps": 0.5, "min_samples": 15}
    assert visa.rvs_options == {"eps": 1.5, "min_samples": 25}
    assert (mvtec.smoothing_240, mvtec.smoothing_240_sdp_plus) == (8, 8)
    assert (visa.smoothing_240, visa.smoothing_240_sdp_plus) == (8, 2)
    assert {protocol(name).trained_on for name in ("headct", "brainmri")} == {"visa"}
    assert {protocol(name).trained_on for name in ("isic", "clinicdb")} == {"mvtec"}


def test_a_caller_cannot_change_the_protocol():
    protocol("mvtec").rvs_options["eps"] = 9
    assert protocol("mvtec").rvs_options["eps"] == 0.5


def test_demo_protocol_fits_the_shipped_model():
    file = data_dir() / "demo" / "model" / "open_clip_config.json"
    if not file.is_file():
        pytest.skip("the demo model is not there")
    vision = json.loads(file.read_text())["model_cfg"]["vision_cfg"]
    p = protocol("demo")
    assert p.stages == tuple(vision["layers"] * i // 4 for i in (1, 2, 3, 4))


def test_data_dir_variable_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPAD_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.setenv("CLIPAD_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=r"absent.*CLIPAD_DATA"):
        data_dir()


def test_data_dir_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("CLIPAD_DATA", raising=False)
    (tmp_path / "data").mkdir()  # some other folder of that name
    monkeypatch.setattr(published, "__file__", str(tmp_path / "clipad" / "published.py"))
    with pytest.raises(FileNotFoundError, match="CLIPAD_DATA"):
        data_dir()
