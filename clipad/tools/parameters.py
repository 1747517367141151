"""Parameters of notebooks: what the cell tagged ``parameters`` declares, and values that may be passed.

papermill warns of unknown names and guesses types; here both are refused before a kernel starts. The cell says one
parameter a line, ``name: type = default  # help``:

* type: ``str int float bool list dict``, also ``list[str]``, ``dict[str, float]`` and the like;
* the end of the help may limit the values: ``[mean|pca|kde]`` (choices), ``[1..16]``, ``[0..]``, ``[..1]`` (ranges,
  ends included). No ``=`` in the help: papermill does not see such a line;
* a ``str`` parameter whose help starts with "path" is a path: a relative value counts from where the command was
  typed. With "path" later in the help ("tag, or path of a file") it is one only if such a file exists;
* empty values (``""``, ``0``, ``[]``, ``{}``) mean "what the preset says" and are never out of range.
"""

import ast
import contextlib
import difflib
import math
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path

TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
EMPTY = {"str": "", "int": 0, "float": 0.0, "list": [], "dict": {}}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value) -> str:
    """A value as an error prints it: never more than a line or two, whatever it is.

    >>> len(shown("x" * 10**6)), len(shown([["y"] * 1000] * 1000)) < 500
    (80, True)
    """
    return _short.repr(value)


def nearest(name: str, known) -> str:
    """What an error adds to an unknown name.

    >>> nearest("sead", ["seed", "device"])
    "did you mean 'seed'? known: seed, device"
    """
    close = difflib.get_close_matches(str(name)[:100], list(known), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known) or 'none'}"


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

    def is_path(self, value: str) -> bool:
        """Whether the value names a file or folder; see the docstring of the module."""
        found = re.search(r"\bpath\b", self.help) if self.type == "str" else None
        return found is not None and (found.start() == 0 or Path(value).expanduser().exists())


def declared(notebook, name: str) -> dict[str, Parameter]:
    """The parameters of a notebook node, by name, as papermill's ``inspect_notebook`` sees them.

    ``name``: what errors call the notebook. Raises ValueError for a parameter that papermill does not see, that has a
    type not listed above or a default that does not fit its type.
    """
    from papermill import inspect_notebook

    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{name}: expected one cell tagged `parameters`, found {len(cells)}")
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        place = f"line {error.lineno} of the parameters cell"
        raise ValueError(f"{name}: {place} is no Python: {error.msg}") from None
    seen = {key: _parameter(line, name) for key, line in inspect_notebook(notebook).items()}
    for statement in statements:
        for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
            if isinstance(target, ast.Name) and target.id not in seen:
                raise ValueError(
                    f"{name}: papermill does not see the parameter {target.id!r} in line {statement.lineno} of the "
                    "parameters cell; write `name: type = default  # help`, a plain type, one `=` (ranges: [0..])"
                )
    return seen


def _parameter(found: dict, notebook: str) -> Parameter:
    name, help_text = found["name"], found["help"]
    try:
        default = ast.literal_eval(found["default"])
    except (ValueError, SyntaxError):
        raise ValueError(
            f"{notebook}: the default of {name!r} is no plain value: {found['default']}"
        ) from None
    kind = found["inferred_type_name"].replace(" ", "")
    if kind == "None":
        kind = type(default).__name__
    if kind.partition("[")[0] not in TYPES or not set(re.findall(r"\w+", kind)) <= set(TYPES):
        raise ValueError(
            f"{notebook}: {name!r} has the type {kind}; expected one of {', '.join(TYPES)}"
        )
    if not _fits(default, kind):
        raise ValueError(f"{notebook}: the default of {name!r} is {default!r}, its type is {kind}")
    return Parameter(name, kind, default, help_text, **_limits(help_text))


def _limits(help_text: str) -> dict:
    """``choices``, or ``low`` and ``high``, from the brackets that end a help."""
    bracket = re.search(r"\[([^\[\]]+)\]$", help_text)
    if not bracket:
        return {}
    if ends := re.fullmatch(r"(-?[\d.]*\d)?\.\.(-?[\d.]*\d)?", bracket[1].replace(" ", "")):
        pairs = zip(("low", "high"), ends.groups(), strict=True)
        return {end: float(number) for end, number in pairs if number}
    if "|" in bracket[1]:
        return {"choices": tuple(choice.strip() for choice in bracket[1].split("|"))}
    return {}


# --- values ---------------------------------------------------------------------------------------------------------


def checked(parameter: Parameter, value):
    """The value as the notebook may get it: right type, allowed, a path made absolute; else ValueError."""
    name, kind = parameter.name, parameter.type
    if kind != "bool" and not isinstance(value, bool) and value in ("", 0):
        return EMPTY[kind.partition("[")[0]]
    if not _fits(value, kind):
        found = f"found {type(value).__name__} {shown(value)}"
        raise ValueError(f"{name} expects {kind}, {found}{_advice(name, kind, value)}")
    for item in value if isinstance(value, list) else [value]:
        _require_allowed(parameter, item)
    if value and parameter.is_path(value):
        return str(Path(value).expanduser().resolve())
    return value


def _require_allowed(parameter: Parameter, item) -> None:
    name, low, high = parameter.name, parameter.low, parameter.high
    if isinstance(item, float) and not math.isfinite(item):
        raise ValueError(f"{name} expects a finite number, found {item}")
    if parameter.choices and str(item) not in parameter.choices:
        raise ValueError(f"{name} cannot be {shown(item)}; {nearest(item, parameter.choices)}")
    if isinstance(item, int | float) and not low <= item <= high:
        ends = (f"{end:g}" if math.isfinite(end) else "" for end in (low, high))
        raise ValueError(f"{name} must lie in {'..'.join(ends)}, found {shown(item)}")


def _fits(value, kind: str) -> bool:
    """Whether ``value`` has the type that is written ``kind``: "float" takes an int, "int" takes no bool.

    Items of a bare ``list`` are text and numbers (YAML reads ``[no, on]`` as booleans), or lists of these.
    """
    outer, _, inner = kind.partition("[")
    if isinstance(value, bool):
        return outer == "bool"
    if not isinstance(value, TYPES[outer]):
        return False
    if outer == "list" and not inner:
        return all(any(_fits(item, k) for k in ("str", "float", "list")) for item in value)
    if outer == "list":
        return all(_fits(item, inner[:-1]) for item in value)
    if outer == "dict":
        key, _, item = inner[:-1].partition(",")
        return all(
            _fits(k, key or "str") and (not item or _fits(v, item)) for k, v in value.items()
        )
    return True


def _advice(name: str, kind: str, value) -> str:
    if kind.startswith("dict"):
        return f"; -p cannot say this, use YAML: -y '{name}: {{key: value}}'"
    if kind.startswith("list") and isinstance(value, list):
        return (
            f'; text that looks like a number, yes or no needs quotes: -y \'{name}: ["01", "no"]\''
        )
    if kind.startswith("list"):
        return f"; -p cannot say this, use YAML: -y '{name}: [a, b]'"
    if kind == "str" and isinstance(value, int | float):
        return f"; for text that looks like a number or True/False use YAML: -y '{name}: \"{shown(value)}\"'"
    return ""


# --- from the command line ------------------------------------------------------------------------------------------


def read_parameters(pairs, texts, files) -> dict:
    """Parameters of ``-f``, ``-y`` and ``-p``; as with papermill, a later kind wins.

    Raises ValueError for what is no mapping of names to plain values, OSError for a file that cannot be read.
    """
    values = {}
    for name in files:
        values |= _mapping(read_yaml(Path(name).expanduser()), f"the file {name}")
    for text in texts:
        values |= _mapping(parse_yaml(text, f"-y {shown(text)}"), f"-y {shown(text)}")
    return values | {name: guess_type(value) for name, value in pairs}


def _mapping(found, place: str) -> dict:
    if not isinstance(found, dict):
        raise ValueError(f"{place} holds {type(found).__name__}, expected `name: value`")
    for name in found:
        if not isinstance(name, str):
            raise ValueError(f"{place}: the name {shown(name)} is no text")
    return found


def read_yaml(path: Path):
    """What a YAML file holds; ValueError that names it for what is no YAML in UTF-8, OSError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no YAML in UTF-8: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, place: str):
    """Plain values of YAML: dates stay text; no references (a few lines of them stand for gigabytes), no name twice."""
    import yaml
    from papermill.iorw import NoDatesSafeLoader

    class Loader(NoDatesSafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("references (*name) are not read: write the value itself")
            return super().compose_node(parent, index)

        def construct_mapping(self, node, deep=False):
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise yaml.YAMLError(f"a name stands twice, known so far: {shown(list(found))}")
            return found

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{place} is no YAML: {str(error)[:300]}") from None


def guess_type(text: str):
    """papermill's rule for the values of ``-p``.

    >>> [guess_type(text) for text in ("True", "3", "1e-3", "screw", "[1,2]")]
    [True, 3, 0.001, 'screw', '[1,2]']
    """
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    return text
