"""Published numbers and published hyper-parameters, each with its source."""

import os
from pathlib import Path


def data_dir() -> Path:
    """The folder ``data/`` with the demo collections and the published results.

    ``$CLIPAD_DATA`` wins when it is set; otherwise the folder ``data/`` beside the package, which an editable
    install (``pip install -e .`` in a checkout) has.

    Raises:
        FileNotFoundError: there is no such folder; the message says what to do.
    """
    if named := os.environ.get("CLIPAD_DATA"):
        folder = Path(named).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"CLIPAD_DATA is set to {named!r}, which is not a folder; correct or unset it."
            )
        return folder
    folder = Path(__file__).resolve().parents[1] / "data"
    # A folder that merely happens to be called data must not be taken for ours.
    if not (folder / "published_results.csv").is_file():
        raise FileNotFoundError(
            f"There is no clipad data folder at {folder}. Install from a checkout with `pip install -e .`, "
            "or set the environment variable CLIPAD_DATA to the folder `data` of a checkout."
        )
    return folder
