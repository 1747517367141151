"""The checks under the exercises of the notebooks."""

from collections.abc import Callable
from typing import Any

from IPython.display import Markdown, display

SOLVED, NOT_YET = "Solved", "Not yet"


def check(answer: Any, test: Callable[[], Any], hint: str) -> None:
    """Say whether an exercise is solved, and if not, what to look at; nothing while the answer is still ``...``.

    A test that raises counts as "not yet", so that a notebook runs through. The cell above has the tag ``exercise``;
    its solution stands folded before it, as the one ``python`` block inside ``<details>``.
    """
    if answer is ...:
        return
    try:
        solved, why = bool(test()), ""
    except Exception as error:
        solved, why = False, f" ({type(error).__name__}: {error})"
    display(Markdown(f"**{SOLVED}.**" if solved else f"**{NOT_YET}.** {hint}{why}"))
