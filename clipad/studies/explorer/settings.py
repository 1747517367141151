"""What a reader can set in the explorer, and the command that brings it back."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from clipad.datasets import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from clipad.studies.explorer.model import Explorer


@dataclass(frozen=True)
class Settings:
    """What one side of the explorer shows. The fields are parameters of notebook 06, under the same names.

    ``image``: its path within the data set's folder, or the path of any file. ``normal_words``, ``anomalous_words``:
    phrases with commas between them, ``{}`` for the object (behind the phrase if left out); empty for the ensemble.
    ``flawless``: a folder of flawless images; empty for those of the image's category. ``stages``: blocks, some of the
    four quarters' ends. ``surgery``: feature surgery, or the cosine with the anomalous vector alone.
    ``smoothing``: sigma in pixels. ``false_alarms``: percent of the flawless images whose maximum is above the
    threshold. ``look``: row and column of a patch and the block of its attention, all from 1.
    """

    image: str
    object_name: str
    detector: str = "sdp"
    rvs: str = "dbscan"
    normal_words: str = ""
    anomalous_words: str = ""
    flawless: str = ""
    stages: tuple[int, ...] = ()
    surgery: bool = True
    smoothing: float = 0.0
    false_alarms: float = 5.0
    look: tuple[int, ...] = ()


def phrases(text: str) -> tuple[str, ...]:
    """State words as a user types them -> phrases of :class:`clipad.Prompts`.

    >>> phrases("flawless, {} without scratch")
    ('flawless {}', '{} without scratch')

    Raises ValueError for a phrase with other braces than one ``{}``, or one that stands twice.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    found = [part if re.search("[{}]", part) else part + " {}" for part in found]
    for part in found:
        if part.count("{}") != 1 or len(re.findall("[{}]", part)) != 2:
            raise ValueError(
                f"a state has one {{}} for the object and no other braces; found {part!r}"
            )
    if len(set(found)) < len(found):
        raise ValueError(f"a state stands twice in {text!r}")
    if not found:
        raise ValueError(f"no state words in {text!r}")
    return tuple(found)


def list_images(folder: str) -> list[str]:
    """Paths of the images in a folder (not below), by name. ValueError if it is no folder or holds none."""
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise ValueError(f"{folder!r} is no folder")
    found = [p for p in sorted(place.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise ValueError(f"{folder!r} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [str(path.resolve()) for path in found]


def command(
    explorer: Explorer, settings: Settings, other: Settings, base: Mapping | None = None
) -> str:
    """What to type in a shell to get A and B again: ``clipad run 06 ...``.

    ``base``: parameters with which the notebook itself runs (preset, data set, model, ...); empty ones are left out.
    """
    default = explorer.settings(image=settings.image)
    values = {k: v for k, v in (base or {}).items() if v and (k, v) != ("preset", "demo")}
    values |= {"image": settings.image} | _changes(default, settings)
    changed = _changes(settings, other)
    if changed != _changes(settings, explorer.beside(settings)):
        values["compare_with"] = changed or {"image": other.image}
    words = ["clipad", "run", "06"]
    for name, value in values.items():
        plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_./-][\w./-]*", value)
        if plain and value.lower() not in ("true", "false", "none", "nan", "inf", "infinity"):
            words += ["-p", name, value]
        else:
            text = yaml.safe_dump(
                {name: value}, default_flow_style=True, width=10_000, allow_unicode=True
            )
            words += ["-y", text.strip()]
    return shlex.join(words)


def _changes(one: Settings, two: Settings) -> dict:
    """What differs in the second, as plain YAML values."""
    first, second = asdict(one), asdict(two)
    changed = {key: value for key, value in second.items() if value != first[key]}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
