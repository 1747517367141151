"""What a notebook's cell tagged ``parameters`` declares, one a line, ``name: type = default  # help``:

* type: ``str int float bool list list[str] dict``; the default's own if left out;
* the end of the help may limit the values: ``[mean|pca|kde]`` (choices), ``[1..16]``, ``[0..]``, ``[..1]`` (ranges,
  ends included);
* a ``str`` whose help starts with "path" is a path: a relative value counts from where the command was typed. With
  "path" later in the help ("tag, or path of a file") it is one only if such a file exists;
* empty values (``""``, ``0``, ``[]``, ``{}``) mean "what the preset says" and are never out of range.
"""

import ast
import contextlib
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

import yaml
from papermill.translators import PythonTranslator

from clipad.io.files import did_you_mean

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict}
TYPES |= {"list": list, "list[str]": list}
IN_YAML = {"str": '"03"', "list": "[a, 3]", "list[str]": '[a, "03"]', "dict": "{key: value}"}
"""how values are written that YAML would read as something else, or ``-p`` cannot say"""


@dataclass(frozen=True)
class Parameter:
    """One line of the cell; ``limits``: what stands between the brackets that end its help."""

    name: str
    type: str
    default: object
    help: str
    limits: str

    def checked(self, value):
        """The value as a notebook may get it: right type, allowed, a path made absolute; else ValueError."""
        kind = TYPES[self.type]
        if isinstance(value, str) and kind in (int, float, bool):  # `-p` gives text
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
        if value in ("", 0) and bool not in (kind, type(value)):
            return kind()
        fits = type(value) is kind or (kind is float and type(value) is int)
        if self.type == "list[str]" and fits:
            fits = all(isinstance(item, str) for item in value)
        if not fits:
            example = IN_YAML.get(self.type)
            advice = f"; in YAML: -y '{self.name}: {example}'" if example else ""
            found = f"{type(value).__name__} {reprlib.repr(value)}{advice}"
            raise ValueError(f"{self.name} expects {self.type}, found {found}")
        for item in value if kind is list else [value]:
            self._require_allowed(item)
        return str(Path(value).expanduser().resolve()) if self.is_path(value) else value

    def _require_allowed(self, item) -> None:
        low, is_range, high = self.limits.partition("..")
        choices = self.limits.split("|")
        if is_range and not float(low or "-inf") <= item <= float(high or "inf"):
            raise ValueError(f"{self.name} must lie in {self.limits}, found {item}")
        if self.limits and not is_range and str(item) not in choices:
            hint = f"{did_you_mean(item, choices)}: one of {', '.join(choices)}"
            raise ValueError(f"{self.name} cannot be {reprlib.repr(item)}{hint}")

    def is_path(self, value) -> bool:
        if self.type != "str" or not value or "path" not in self.help.split():
            return False
        return self.help.startswith("path") or Path(value).expanduser().exists()


def declared(source: str) -> dict[str, Parameter]:
    """The parameters in a cell's source, by name; ValueError for another type or a default that is no plain value."""
    found = {}
    for name, kind, default, text in PythonTranslator.inspect({"source": source}):
        limits = re.search(r"\[([^\[\]]+)\]$", text)
        try:
            default = ast.literal_eval(default)
            kind = type(default).__name__ if kind == "None" else kind
            TYPES[kind]
        except (KeyError, ValueError, SyntaxError):
            form = f"`name: type = default  # help`, with a type of {', '.join(TYPES)}"
            raise ValueError(f"{name}: expected {form} and a plain value") from None
        found[name] = Parameter(name, kind, default, text, limits[1] if limits else "")
    return found


def require_known(names, known, what: str) -> None:
    """ValueError for the first of the names that is not known."""
    for name in names:
        if name not in known:
            hint = f"{did_you_mean(name, known)}; known: {', '.join(known) or 'none'}"
            raise ValueError(f"{what}: unknown parameter {reprlib.repr(name)}{hint}")


def read_parameters(pairs, texts, files) -> dict:
    """Parameters of ``-f``, ``-y`` and ``-p``, a later kind wins; ValueError for what is no mapping."""
    contents = [(name, Path(name).read_bytes()) for name in files]
    contents += [(f"-y {text[:80]}", text) for text in texts]
    values = {}
    for place, content in contents:
        mapping = read_yaml(content, place)
        if not isinstance(mapping, dict):
            raise ValueError(f"{place} holds {reprlib.repr(mapping)}, expected `name: value`")
        values |= mapping
    return values | dict(pairs)


def read_yaml(content: str | bytes, place):
    """Plain values of YAML; ValueError that names the place for what is none."""
    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is no YAML: {error}") from None
