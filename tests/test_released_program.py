import numpy as np
import pandas as pd
import pytest
from small_data import make_folder

from clipad.studies.benchmark.released_program import (
    min_max,
    vanished,
    without_one,
)


def test_an_image_score_depends_on_the_other_images():
    images = pd.DataFrame(
        {
            "category": "bolt",
            "label": [0, 0, 1, 1],
            "probability": [0.0, 0.4, 0.5, 1.0],
            "map_max": [0.0, 0.4, 0.2, 0.5],
        }
    )
    row = without_one(images).loc["bolt"]
    # Without the first image the third has 0.1 / 0.6 + 0 instead of 0.5 + 0.4, although nothing of it was changed.
    assert row["largest change"] == pytest.approx(0.9 - 1 / 6)
    # A score that is one number only, whatever its scale, keeps its order.
    alone = without_one(images.assign(map_max=0.0)).loc["bolt"]
    assert alone["orders changed"] == 0
    assert alone["auroc low"] == alone["auroc high"] == 0


def test_min_max_of_each_image_lights_up_a_flat_map():
    maps = np.stack([np.linspace(0, 0.1, 16).reshape(4, 4), np.linspace(0, 1, 16).reshape(4, 4)])
    assert min_max(maps, per_image=False)[0].max() == pytest.approx(0.1)
    assert min_max(maps, per_image=True)[0].max() == 1
    assert np.isfinite(min_max(np.zeros((2, 3, 3)), per_image=True)).all()


def test_thin_defects_vanish(tmp_path):
    from PIL import Image

    data = make_folder(tmp_path, ("bolt",), side=48)
    thin = np.zeros((48, 56), np.uint8)
    thin[:, 10] = 255
    thin[20:40, 20:40] = 255
    Image.fromarray(thin).save(
        data.samples[-1].mask_path if data.samples[-1].label else data.samples[0].mask_path
    )
    table = vanished(data, [1, 4])
    assert table.loc[1, "regions"] == 0
    assert table.loc[4, "side"] == 14
    assert table.loc[4, "regions"] == pytest.approx(
        1 / 5
    )  # the line of one of four images; its block stays
    assert table.loc[4, "masks"] == 0
