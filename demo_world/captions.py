"""What can be said of a picture of the demo world: captions in the words of the paper's prompts, and which are true.

The states and templates are those of CLIP-AD's prompt ensemble (METHOD.md section 2), each with a meaning here.
No torch in this file: the words that the model has seen are computed from the grammar.
"""

from dataclasses import dataclass

import numpy as np

from clipad.prompts import CLIP_AD, words
from demo_world.renderer import ATTRIBUTES, BACKGROUNDS, CATEGORIES, COLOURS, DEFECTS, Facts

NORMAL_STATES = CLIP_AD.normal  # said of every picture without a defect, and only of those
# Said of every picture with a defect ...
ANY_DEFECT_STATES = (
    "damaged {}",
    "imperfect {}",
    "blemished {}",
    "{} with flaw",
    "{} with defect",
    "{} with damage",
)
# ... and these of that one defect (a phrase that is in both lists is only said more often).
DEFECT_STATES = {
    "scratch": ("{} with scratch",),
    "crack": ("{} with crack", "broken {}"),
    "hole": ("{} with damage", "damaged {}"),
    "stain": ("{} with contamination",),
    "spot": ("{} with contamination", "blemished {}"),
    "dent": ("{} with damage", "blemished {}"),
    "cut": ("broken {}", "damaged {}"),
    "broken": ("broken {}", "{} with crack"),
}
ANOMALOUS_STATES = tuple(
    dict.fromkeys(
        [*ANY_DEFECT_STATES, *(state for states in DEFECT_STATES.values() for state in states)]
    )
)

# A template with an attribute's adjective is said only of pictures with that attribute, the others of all.
ATTRIBUTE_TEMPLATES = {
    attribute: tuple(t for t in CLIP_AD.templates if f" {attribute} " in t)
    for attribute in ATTRIBUTES
}
PLAIN_TEMPLATES = tuple(
    t for t in CLIP_AD.templates if not any(t in ts for ts in ATTRIBUTE_TEMPLATES.values())
)
BACKGROUND_PHRASE = "{} on a {} background"


@dataclass(frozen=True)
class Caption:
    """A sentence and what it claims; None where it says nothing.

    `state` is "normal" or one of `ANOMALOUS_STATES`.
    """

    text: str
    category: str
    state: str | None = None
    colour: str | None = None
    background: str | None = None
    attribute: str | None = None


def caption(rng: np.random.Generator, facts: Facts) -> Caption:
    """A true sentence about a picture. It always names the category, and by chance the state (80 %), the colour
    (30 %), the background (20 %) and the attribute (60 %, where there is one).

    >>> facts = Facts("gear", "blue", "white", None, "crack")
    >>> caption(np.random.default_rng(2), facts).text
    'a photo of the blue gear with crack.'
    """
    name, state, colour, background, attribute = facts.category, None, None, None, None
    if rng.random() < 0.3:
        colour = facts.colour
        name = f"{colour} {name}"
    if rng.random() < 0.8:
        if facts.defect is None:
            state, phrases = "normal", NORMAL_STATES
        else:
            phrases = ANY_DEFECT_STATES if rng.random() < 0.5 else DEFECT_STATES[facts.defect]
        phrase = phrases[rng.integers(len(phrases))]
        state = state or phrase
        name = phrase.format(name)
    if facts.background and rng.random() < 0.2:
        background = facts.background
        name = BACKGROUND_PHRASE.format(name, background)
    templates = PLAIN_TEMPLATES
    if facts.attribute and rng.random() < 0.6:
        attribute = facts.attribute
        templates = ATTRIBUTE_TEMPLATES[attribute]
    text = templates[rng.integers(len(templates))].format(name)
    return Caption(text, facts.category, state, colour, background, attribute)


def is_state_true(state: str | None, defect: str | None) -> bool:
    """Whether a claimed state holds for a picture with that defect (None: without one).

    >>> is_state_true("broken {}", "cut"), is_state_true("broken {}", "stain"), is_state_true("normal", "stain")
    (True, False, False)
    """
    if state is None:
        return True
    if state == "normal" or defect is None:
        return state == "normal" and defect is None
    return state in ANY_DEFECT_STATES or state in DEFECT_STATES[defect]


_STATES = (None, "normal", *ANOMALOUS_STATES)
_DEFECTS = (None, *DEFECTS)
_STATE_TABLE = np.array(
    [[is_state_true(state, defect) for state in _STATES] for defect in _DEFECTS]
)


def truth_matrix(facts: list[Facts], captions: list[Caption]) -> np.ndarray:
    """Which caption is true of which picture: len(facts) x len(captions) bool."""
    true = _STATE_TABLE[
        np.ix_(
            [_DEFECTS.index(f.defect) for f in facts], [_STATES.index(c.state) for c in captions]
        )
    ]
    for claim in ("category", "colour", "background", "attribute"):
        actual = np.array([getattr(f, claim) or "" for f in facts])
        claimed = np.array([getattr(c, claim) or "" for c in captions])
        true = true & ((claimed == "") | (claimed == actual[:, None]))
    return true


def seen_words() -> frozenset[str]:
    """Every word that occurs in a caption, so every word that the demo model's text encoder was trained on."""
    phrases = [
        *CATEGORIES,
        *COLOURS,
        *BACKGROUNDS,
        *NORMAL_STATES,
        *ANOMALOUS_STATES,
        *CLIP_AD.templates,
        BACKGROUND_PHRASE,
    ]
    return frozenset(word for phrase in phrases for word in words(phrase))
