import json
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or writes the cache of the person who runs it."""
    os.environ["CLIPAD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


class Golden:
    """One reference file: arrays by name, and the small vision tower whose outputs they are."""

    def __init__(self, name):
        self.arrays = np.load(GOLDEN / f"{name}.npz")
        self.config = json.loads(str(self.arrays["config"]))

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])

    def visual(self):
        text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
        model = open_clip.CLIP(
            embed_dim=self.config["embed_dim"],
            vision_cfg=self.config["vision_cfg"],
            text_cfg=text,
            quick_gelu=False,
        )
        weights = {
            k.removeprefix("weights/visual."): self[k]
            for k in self.arrays.files
            if k.startswith("weights/")
        }
        model.visual.load_state_dict(weights, strict=True)
        return model.visual.eval().requires_grad_(False)


@pytest.fixture(params=["dual_path_12", "dual_path_12_two_stages"])
def golden(request):
    return Golden(request.param)


def tiny_clip(layers=4, image_size=32, width=32, **vision):
    """An open_clip CLIP with random weights that runs in milliseconds."""
    torch.manual_seed(0)
    vision = {
        "image_size": image_size,
        "layers": layers,
        "width": width,
        "patch_size": 8,
        "head_width": 16,
    } | vision
    text = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()


@pytest.fixture
def tiny_backbone():
    from clipad.backbone import Backbone

    return Backbone(
        tiny_clip(), open_clip.SimpleTokenizer(context_length=32), name="tiny", pretrained="random weights",
        mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28),
    )  # fmt: skip
