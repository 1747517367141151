"""clipad: CLIP-AD (arXiv 2311.00453) reproduced step by step.

The public names are imported on first use, so that ``import clipad`` and ``clipad --help`` stay fast.
"""

import os
from importlib import import_module

# Read by OpenMP when torch is loaded. Its threads would wait for each other by spinning, which on a few busy cores
# makes small models four to eight times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_HOME = {
    "prompts": ["Prompts", "load_prompts"],
    "text": ["representative_vector", "representative_vectors"],
    "dual_path": ["StagedFeatures", "staged_features"],
    "surgery": ["feature_surgery", "similarity_map", "smooth"],
    "linear_layers": ["LinearLayers"],
    "training": ["load_layers", "train"],
    "detectors": ["ClipSurgery", "Direct", "Features", "Prediction", "SDP", "SDPPlus"],
    "winclip": ["WinCLIP"],
    "backbone": ["Backbone", "load_backbone"],
    "datasets": ["Dataset", "Sample", "load_dataset"],
    "metrics": ["image_metrics", "pixel_metrics", "pro_200_thresholds"],
    "io.images": ["read_image", "read_mask"],
    "evaluation": ["Result", "evaluate"],
    "published": ["data_dir", "published_results", "protocol"],
    "studies.experiments": ["Experiment", "experiment", "make_detector"],
    "tools.check_data": ["check_dataset"],
    "tools.detect": ["detect"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)
__version__ = "0.1.0"


def __getattr__(name):
    if name in _MODULE_OF:
        return getattr(import_module(f"clipad.{_MODULE_OF[name]}"), name)
    if name in _HOME:
        return import_module(f"clipad.{name}")
    raise AttributeError(f"module 'clipad' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
