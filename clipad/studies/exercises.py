"""The checks under the exercises of the notebooks."""

from IPython.display import Markdown, display

SOLVED, NOT_YET = "Solved", "Not yet"


def check(solved: bool, hint: str) -> None:
    """Say whether an exercise is solved; if not, say what to look at. Never raises, so that a notebook runs through.

    The cell above has the tag ``exercise`` and is left unfilled (``answer = ...``); its solution stands folded below,
    as the one ``python`` block inside ``<details>``. A test puts it in and expects "Solved", and "Not yet" without it.
    """
    display(Markdown(f"**{SOLVED}.**" if solved else f"**{NOT_YET}.** {hint}"))
