import numpy as np
import pandas as pd
import pytest
from small_data import make_folder

from clipad.studies.benchmark.released_program import vanished, without_one


def test_an_image_score_depends_on_the_other_images():
    images = pd.DataFrame(
        {
            "category": "bolt",
            "label": [0, 1, 1, 0],
            "probability": [1.0, 0.8, 0.0, 0.0],
            "map_max": [0.3, 0.5, 2.0, 0.0],
        }
    )
    # With the third image the first is above the second (1.15, 1.05), without it below (1.6, 1.8).
    assert without_one(images).loc["bolt", "auroc high"] == pytest.approx(0.5)
    # A score that is one number only, whatever its scale, keeps its order.
    alone = without_one(images.assign(map_max=0.0)).loc["bolt"]
    assert alone["auroc low"] == alone["auroc high"] == 0


def test_thin_defects_vanish(tmp_path):
    from PIL import Image

    data = make_folder(tmp_path, ("bolt",), side=48)
    thin = np.zeros((48, 56), np.uint8)
    thin[:, 10] = 255
    Image.fromarray(thin).save(
        data.samples[-1].mask_path if data.samples[-1].label else data.samples[0].mask_path
    )
    assert vanished(data, 1) == 0
    assert vanished(data, 4) == 0.25  # one of four images
