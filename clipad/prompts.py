"""The prompt ensemble (paper section 3.1): states x templates for one object. ``{}`` stands for the state in a template
and for the object in a state."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Prompts:
    """States and templates, and how a category is called in them.

    >>> normal, anomalous = CLIP_AD.sentences("bottle")
    >>> len(normal), len(anomalous), normal[0]
    (198, 220, 'a cropped photo of the flawless bottle.')
    """

    normal: tuple[str, ...]
    anomalous: tuple[str, ...]
    templates: tuple[str, ...]
    object_names: dict[str, str] = field(default_factory=dict)
    """category -> the words that stand for it in a sentence, itself if there is no entry"""

    def sentences(self, category: str) -> tuple[list[str], list[str]]:
        """The normal and the anomalous sentences of a category, state by state; ValueError without a name."""
        name = self.object_names.get(category, category)
        if not name.strip():
            raise ValueError("the object has no name: a prompt needs one, such as 'metal nut'")
        return tuple(
            [template.format(state.format(name)) for state in states for template in self.templates]
            for states in (self.normal, self.anomalous)
        )


# fmt: off
# In the order of the released program: it decides which sentence is which row of the embeddings.
_TEMPLATES = (
    "a cropped photo of the {}.", "a cropped photo of a {}.",
    "a close-up photo of a {}.", "a close-up photo of the {}.",
    "a bright photo of a {}.", "a bright photo of the {}.",
    "a dark photo of the {}.", "a dark photo of a {}.",
    "a jpeg corrupted photo of a {}.", "a jpeg corrupted photo of the {}.",
    "a blurry photo of the {}.", "a blurry photo of a {}.",
    "a photo of the {}.", "a photo of a {}.",
    "a photo of a large {}.", "a photo of the small {}.",
    "a photo of the large {}.", "a photo of a small {}.",
    "a photo of the {} for visual inspection.", "a photo of a {} for visual inspection.",
    "a photo of the {} for anomaly detection.", "a photo of a {} for anomaly detection.",
)

CLIP_AD = Prompts(
    normal=(
        "flawless {}", "perfect {}", "unblemished {}", "{} without flaw", "{} without defect",
        "{} without damage", "{} without scratch", "{} without crack", "{} without contamination",
    ),
    anomalous=(
        "damaged {}", "imperfect {}", "blemished {}", "broken {}", "{} with flaw", "{} with defect",
        "{} with damage", "{} with scratch", "{} with crack", "{} with contamination",
    ),
    templates=_TEMPLATES,
)

# METHOD.md section 8; anomalib lists "a jpeg corrupted photo of the {}." twice, so it counts twice here.
WINCLIP = Prompts(
    normal=(
        "{}", "flawless {}", "perfect {}", "unblemished {}",
        "{} without flaw", "{} without defect", "{} without damage",
    ),
    anomalous=("damaged {}", "{} with flaw", "{} with defect", "{} with damage"),
    templates=tuple(
        "a jpeg corrupted photo of the {}." if t == "a jpeg corrupted photo of a {}." else t
        for t in _TEMPLATES
        if t != "a cropped photo of a {}."
    ),
)
# fmt: on


def load_prompts(path: str | Path | None = None) -> Prompts:
    """Prompts from a YAML file; without a path, those of the paper.

    The file has the lists ``normal``, ``anomalous`` and ``templates``, and may have a mapping ``object_names``
    from category to words::

        normal: ["healthy {}", "{} without lesion"]
        anomalous: ["{} with lesion"]
        templates: ["a photo of a {}."]
        object_names: {brain_mri: "brain scan"}

    A list that is left out is the paper's. Raises ValueError for an entry without exactly one ``{}`` or that stands
    twice, and for an unknown key.
    """
    if path is None:
        return CLIP_AD
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file in UTF-8 ({error})") from None
    lists = {key: list(getattr(CLIP_AD, key)) for key in ("normal", "anomalous", "templates")}
    if not isinstance(found, dict) or not set(found) <= {*lists, "object_names"}:
        expected = ", ".join([*lists, "object_names"])
        raise ValueError(f"{path}: expected keys out of {expected}, found {found!r}")
    names = found.pop("object_names", None) or {}
    lists |= found
    for key, entries in lists.items():
        texts = entries if isinstance(entries, list) else []
        good = [t for t in texts if isinstance(t, str) and re.findall("{}|[{}]", t) == ["{}"]]
        if not good or good != texts or len(set(good)) < len(good):
            raise ValueError(
                f"{path}: '{key}' has to be a list of texts with exactly one {{}} each, none of them twice; "
                f"found {entries!r}"
            )
    if both := set(lists["normal"]) & set(lists["anomalous"]):
        raise ValueError(f"{path}: {min(both)!r} is listed as normal and as anomalous")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{path}: 'object_names' has to map categories to words, found {names!r}")
    return Prompts(**{key: tuple(lists[key]) for key in lists}, object_names=names)


def words(sentence: str) -> list[str]:
    """The words of a sentence, lower case and without punctuation: as the demo model's vocabulary counts them.

    >>> words("A close-up photo of the metal_nut.")
    ['a', 'close-up', 'photo', 'of', 'the', 'metal', 'nut']
    """
    return re.findall(r"[a-z]+(?:-[a-z]+)*", sentence.lower())
