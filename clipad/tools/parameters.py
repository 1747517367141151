"""Parameters of notebooks: what the cell tagged ``parameters`` declares, and values that may be passed.

papermill warns of unknown names and guesses types; here both are refused before a kernel starts. The cell says one
parameter a line, ``name: type = default  # help``:

* type: ``str int float bool list list[str] dict``; the default's own if left out;
* the end of the help may limit the values: ``[mean|pca|kde]`` (choices), ``[1..16]``, ``[0..]``, ``[..1]`` (ranges,
  ends included);
* a ``str`` parameter whose help starts with "path" is a path: a relative value counts from where the command was
  typed. With "path" later in the help ("tag, or path of a file") it is one only if such a file exists;
* empty values (``""``, ``0``, ``[]``, ``{}``) mean "what the preset says" and are never out of range.
"""

import ast
import contextlib
import math
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

from clipad.files import did_you_mean

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict}
TYPES |= {"list": list, "list[str]": list}
IN_YAML = {"str": '"03"', "list": '[3, "no"]', "list[str]": '[a, "03"]', "dict": "{key: value}"}
"""how values are written that YAML would read as something else, or ``-p`` cannot say"""
FROM_TEXT = {"int": int, "float": float, "bool": {"True": True, "False": False}.__getitem__}
"""``-p`` gives text"""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value) -> str:
    """A value as an error prints it: never more than a line or two, whatever it is.

    >>> len(shown("x" * 10**6)), len(shown([["y"] * 1000] * 1000)) < 500
    (80, True)
    """
    return _short.repr(value)


def require_known(names, known, what: str) -> None:
    """ValueError for the first of the names that is not known."""
    for name in names:
        if name not in known:
            hint = f"{did_you_mean(name, known)}; known: {', '.join(known) or 'none'}"
            raise ValueError(f"{what}: unknown parameter {shown(name)}{hint}")


# --- what a notebook declares ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """One line of the cell tagged ``parameters``."""

    name: str
    type: str
    default: object
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf

    def checked(self, value):
        """The value as a notebook may get it: right type, allowed, a path made absolute; else ValueError."""
        if isinstance(value, str) and self.type in FROM_TEXT:
            with contextlib.suppress(ValueError, KeyError):
                value = FROM_TEXT[self.type](value)
        if self.type != "bool" and not isinstance(value, bool) and value in ("", 0, "0"):
            return TYPES[self.type]()
        if not _fits(value, self.type):
            example = IN_YAML.get(self.type)
            advice = f"; in YAML: -y '{self.name}: {example}'" if example else ""
            found = f"{type(value).__name__} {shown(value)}{advice}"
            raise ValueError(f"{self.name} expects {self.type}, found {found}")
        for item in value if isinstance(value, list) else [value]:
            self._require_allowed(item)
        return str(Path(value).expanduser().resolve()) if self._is_path(value) else value

    def _require_allowed(self, item) -> None:
        if self.choices and str(item) not in self.choices:
            hint = f"{did_you_mean(item, self.choices)}: one of {', '.join(self.choices)}"
            raise ValueError(f"{self.name} cannot be {shown(item)}{hint}")
        if isinstance(item, int | float) and not self.low <= item <= self.high:
            ends = (f"{end:g}" if math.isfinite(end) else "" for end in (self.low, self.high))
            raise ValueError(f"{self.name} must lie in {'..'.join(ends)}, found {shown(item)}")

    def _is_path(self, value) -> bool:
        if self.type != "str" or "path" not in self.help.split():
            return False
        return self.help.startswith("path") or Path(value).expanduser().exists()


def _fits(value, kind: str) -> bool:
    """Whether ``value`` has the type that is written ``kind``: "float" takes an int and must be a number, "int" takes
    no bool; items of a list are no bools (YAML reads ``[no, on]`` as such)."""
    if isinstance(value, bool):
        return kind == "bool"
    if isinstance(value, list) and kind == "list[str]":
        return all(isinstance(item, str) for item in value)
    if isinstance(value, list) and any(isinstance(item, bool) for item in value):
        return False
    if kind == "float":
        return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
    return isinstance(value, TYPES[kind])


def declared(source: str, name: str) -> dict[str, Parameter]:
    """The parameters in the source of a cell, by name; ``name``: what errors call it.

    Raises ValueError for a line of another form, an unknown type, or a default that does not fit its type.
    """
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        place = f"line {error.lineno} of the parameters cell"
        raise ValueError(f"{name}: {place} is no Python: {error.msg}") from None
    lines = source.splitlines()
    found = [_parameter(each, lines[each.end_lineno - 1], name) for each in statements]
    return {parameter.name: parameter for parameter in found}


def _parameter(statement: ast.stmt, last_line: str, notebook: str) -> Parameter:
    try:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        name, default = target.id, ast.literal_eval(statement.value)
    except (AttributeError, ValueError):
        raise ValueError(
            f"{notebook}: expected `name: type = default  # help` with a plain value in line "
            f"{statement.lineno} of the parameters cell, found {ast.unparse(statement)}"
        ) from None
    annotation = getattr(statement, "annotation", None)
    kind = ast.unparse(annotation) if annotation else type(default).__name__
    if kind not in TYPES or not _fits(default, kind):
        raise ValueError(
            f"{notebook}: {name} has the type {kind} and the default {shown(default)}; "
            f"expected one of {', '.join(TYPES)}, and a default of that type"
        )
    rest = last_line.encode()[statement.end_col_offset :].decode()
    help_text = rest.partition("#")[2].strip()
    return Parameter(name, kind, default, help_text, **_limits(name, help_text))


def _limits(name: str, help_text: str) -> dict:
    """``choices``, or ``low`` and ``high``, from the brackets that end a help."""
    bracket = re.search(r"\[([^\[\]]+)\]$", help_text)
    if not bracket or name == "device":  # which devices there are, `find_device` knows
        return {}
    if ends := re.fullmatch(r"(-?[\d.]*\d)?\.\.(-?[\d.]*\d)?", bracket[1]):
        pairs = zip(("low", "high"), ends.groups(), strict=True)
        return {end: float(number) for end, number in pairs if number}
    return {"choices": tuple(bracket[1].split("|"))}


# --- from the command line ------------------------------------------------------------------------------------------


def read_parameters(pairs, texts, files) -> dict:
    """Parameters of ``-f``, ``-y`` and ``-p``; as with papermill, a later kind wins.

    Raises ValueError for what is no mapping of names to plain values, OSError for a file that cannot be read.
    """
    contents = [(str(name), Path(name).expanduser().read_bytes()) for name in files]
    contents += [(f"-y {shown(text)}", text) for text in texts]
    values = {}
    for place, content in contents:
        mapping = read_yaml(content, place)
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
            raise ValueError(f"{place} holds {shown(mapping)}, expected `name: value`")
        values |= mapping
    return values | dict(pairs)


def read_yaml(content: str | bytes, place: str):
    """Plain values of YAML; dates stay text. ValueError that names the place for what is no YAML (in UTF-8)."""
    import yaml
    from papermill.iorw import NoDatesSafeLoader

    try:
        return yaml.load(content, NoDatesSafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{place} is no YAML: {str(error)[:300]}") from None
