"""Pages that are generated from the source when the site is built: options, configuration, rooms.

MkDocs calls `on_page_markdown` for each page. A line `<!-- generate: NAME -->` is replaced by what
the function NAME below returns. Sources are read with `ast` and not imported; the default card of
the configuration is run for its values.
"""

import ast
import dataclasses
import pathlib
import re
import runpy
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "sprint_jax"
_MARKER = re.compile(r"^<!-- generate: (\w+) -->$", re.M)
_INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.M)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Fill in the markers of a page. Raises KeyError for an unknown marker."""
    known = {"commands": commands, "configuration": configuration, "rooms": rooms}
    markdown = _INCLUDE.sub(lambda match: included(match.group(1)), markdown)
    return _MARKER.sub(lambda match: known[match.group(1)](), markdown)


def included(name: str) -> str:
    """Return a markdown file of the root as a page of docs/dev, with its links changed to fit."""
    text = (ROOT / name).read_text()
    text = re.sub(r"\]\(docs/", "](../", text)
    return re.sub(r"\[([^\]]+)\]\((?!\.\./|https?:)[^)]+\)", r"`\1`", text)


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a dataclass as its source has it. default: None where the field has none."""

    name: str
    annotation: ast.expr
    default: ast.expr | None
    doc: str


@dataclasses.dataclass(frozen=True)
class Source:
    """Dataclasses and aliases of some modules, by name.

    lines: of the file of each class.
    """

    classes: dict[str, ast.ClassDef]
    values: dict[str, ast.expr]
    lines: dict[str, list[str]]

    def fields(self, name: str) -> list[Field]:
        """Return the fields of a class, those of its base classes first."""
        node, found = self.classes[name], {}
        for base in node.bases:
            if _last(base) in self.classes:
                found |= {field.name: field for field in self.fields(_last(base))}
        for i, statement in enumerate(node.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                after = node.body[i + 1] if i + 1 < len(node.body) else None
                doc = _text(after) or self._comment(name, statement)
                field = Field(statement.target.id, statement.annotation, statement.value, doc)
                found[field.name] = field
        return list(found.values())

    def _comment(self, name: str, statement: ast.AnnAssign) -> str:
        """Return the comment behind a field, or the comment lines above it."""
        lines, last = self.lines[name], statement.end_lineno or statement.lineno
        behind = re.search(r"(?<=\s)#\s?(.*)$", lines[last - 1][statement.end_col_offset or 0 :])
        if behind:
            return behind.group(1)
        above, i = [], statement.lineno - 2
        while i >= 0 and lines[i].strip().startswith("#"):
            above.insert(0, lines[i].strip().lstrip("# "))
            i -= 1
        return " ".join(above)

    def type(self, annotation: ast.expr) -> str:
        """Return a type for people, with aliases and `Annotated` resolved."""
        if isinstance(annotation, ast.Name) and annotation.id in self.values:
            return self.type(self.values[annotation.id])
        if isinstance(annotation, ast.BinOp):
            sides = (self.type(annotation.left), self.type(annotation.right))
            return " or ".join(side for side in sides if side != "None")
        if isinstance(annotation, ast.Subscript):
            inner = annotation.slice
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            kind = _last(annotation.value)
            if kind == "Annotated":
                return self.type(parts[0])
            if kind == "Literal":
                return ", ".join(f"`{ast.literal_eval(p)}`" for p in parts)
            if kind in ("Optional", "ClassVar"):
                return self.type(parts[0])
            if kind in ("tuple", "list", "Sequence"):
                return f"list of {self.type(parts[0])}"
        name = ast.unparse(annotation).rpartition(".")[2]
        return "path" if name == "LocalPath" else name


def source(*folders: pathlib.Path) -> Source:
    """Read the dataclasses of all modules in the folders, or of single files."""
    found = Source({}, {}, {})
    paths = [
        p for f in folders for p in ([f] if f.is_file() else sorted(f.rglob("*.py"))) if p.exists()
    ]
    for path in paths:
        text = path.read_text()
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                found.classes[node.name] = node
                found.lines[node.name] = text.splitlines()
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.values[node.targets[0].id] = node.value
    return found


def commands() -> str:
    """Return a section for each command, with a table of its options."""
    sections = []
    for name, (read, fields) in options().items():
        path = PACKAGE / "commands" / f"{name}.py"
        description = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
        sections += [f"## {name}", "", _paragraphs(description), ""]
        sections += ["| option | type | default | meaning |", "|---|---|---|---|"]
        sections += [*(_option(read, field) for field in fields), ""]
    return "\n".join(sections)


def options() -> dict[str, tuple[Source, list[Field]]]:
    """Return the options of each command, with the source that explains their types."""
    package, found = source(PACKAGE), {}
    for path in sorted((PACKAGE / "commands").glob("[a-z]*.py")):
        file, name = _options(path)
        own = source(file)
        read = dataclasses.replace(
            package, classes=package.classes | own.classes, lines=package.lines | own.lines
        )
        found[path.stem] = read, read.fields(name)
    return found


def _options(path: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Return the file and the name of the class of a command's options."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if "Options" in (alias.name, alias.asname):
                    words = (node.module or "").split(".")[1:]
                    return PACKAGE.joinpath(*words).with_suffix(".py"), alias.name
    return path, "Options"


def option_name(field: Field) -> str:
    """Return the name of an option on the command line."""
    return field.name.rstrip("_")  # `from` is no name in Python


def _option(read: Source, field: Field) -> str:
    default = "required" if field.default is None else _default(field.default)
    name = "config.KEY" if field.name == "overrides" else option_name(field)
    cells = (f"`--{name}`", read.type(field.annotation), default, field.doc)
    return _row(cells)


def configuration() -> str:
    """Return a section for each part of the configuration, with a table of its keys."""
    read, card = source(PACKAGE / "config.py", PACKAGE / "objectives", PACKAGE / "optim"), _card()
    methods = [
        name
        for name, node in source(PACKAGE / "objectives").classes.items()
        if _is_dataclass(node) and "kind" in [field.name for field in read.fields(name)]
    ]
    waiting = [("Config", "config")]
    waiting += [(name, "config.phases.NAME.objective") for name in methods]
    lines, done = [], set()
    while waiting:
        name, path = waiting.pop(0)
        if name in done:
            continue
        done.add(name)
        lines += [f"## {_title(name)}", "", _doc(read.classes[name]), ""]
        lines += ["| key | type | default card | meaning |", "|---|---|---|---|"]
        inner = []
        for field in read.fields(name):
            place, kind = f"{path}.{field.name}", read.type(field.annotation)
            if target := _section_of(field.annotation, read):
                kind = f"section, see {_link(target)}"
                if isinstance(field.annotation, ast.Subscript):  # dict[str, Section]
                    place += ".NAME" if name == "Config" else ".ROLE"
                inner.append((target, place))
            elif field.name == "objective":
                kind = "section, see " + ", ".join(map(_link, methods))
            lines.append(_row((f"`{place}`", kind, _values(card, place), field.doc)))
        lines.append("")
        waiting = inner + waiting
    return "\n".join(lines)


def _card() -> dict:
    """Return the default card as nested dicts."""
    sys.path.insert(0, str(ROOT))  # the package need not be installed
    try:
        return runpy.run_path(str(ROOT / "configs/sprint.py"))["get_config"]().to_dict()
    finally:
        sys.path.remove(str(ROOT))


def _values(card: dict, path: str) -> str:
    """Return the value of the default card at a path, and of which sections, where it differs."""
    places = [("", card)]
    for word in path.split(".")[1:]:
        many = word in ("NAME", "ROLE")
        places = [
            (f"{at} {name}".strip() if many else at, section[name])
            for at, section in places
            for name in (_ordered(card, section) if many else [word])
            if name in section
        ]
    values: dict[str, list[str]] = {}
    for at, value in places:
        if not isinstance(value, dict):
            values.setdefault(f"`{value}`" if value != "" else '`""`', []).append(at)
    if len(values) <= 1:
        return next(iter(values), "")
    return "; ".join(f"{', '.join(where)}: {value}" for value, where in values.items())


def _ordered(card: dict, section: dict) -> list[str]:
    """Return the names of a section; phases come in the order in which they run."""
    return sorted(section, key=lambda name: [*card["order"], name].index(name))


def _section_of(annotation: ast.expr, read: Source) -> str:
    """Return the name of the dataclass that a field holds, "" if it holds a plain value."""
    names = [
        _last(node) for node in ast.walk(annotation) if isinstance(node, ast.Name | ast.Attribute)
    ]
    return next((n for n in names if n in read.classes and _is_dataclass(read.classes[n])), "")


def _link(name: str) -> str:
    return f"[{_title(name)}](#{_title(name).lower()})"


def _title(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name)


def rooms() -> str:
    """Return the rooms of the package as an SVG drawing, and a table of who may import whom."""
    allowed = {room: below for room, below in _allowed().items() if room != "__main__"}
    rows = [_row(("room", "may import")), "|---|---|"]
    rows += [
        _row((f"`{room}`", ", ".join(sorted(below)) or "nothing"))
        for room, below in allowed.items()
    ]
    return "\n".join([_drawing(allowed), "", *rows])


def _allowed() -> dict[str, set[str]]:
    """Read the list of imports that tests/house/test_structure.py allows."""
    tree = ast.parse((ROOT / "tests/house/test_structure.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and _last(node.targets[0]) == "ALLOWED":
            return {
                key.value: {e.value for e in getattr(value, "elts", ())}  # set() has no elements
                for key, value in zip(node.value.keys, node.value.values, strict=True)
            }
    raise KeyError("ALLOWED")


def _drawing(allowed: dict[str, set[str]]) -> str:
    """Draw each room on a floor above those that it imports, without arrows that others imply."""
    floor: dict[str, int] = {}
    while left := [room for room in allowed if room not in floor]:
        # Rooms that import each other are never ready; the first of them is placed as if it were.
        ready = [room for room in left if allowed[room] <= floor.keys()] or left[:1]
        placed = {
            r: max((floor[b] + 1 for b in allowed[r] if b in floor), default=0) for r in ready
        }
        floor |= placed
    floors = [[r for r in allowed if floor[r] == i] for i in range(max(floor.values()) + 1)]
    width, height = 1000, 74 * len(floors)
    place = {}
    for i, names in enumerate(floors):
        for j, room in enumerate(names):
            place[room] = (width * (j + 0.5) / len(names), height - 74 * i - 40)
    lines = []
    for room, below in allowed.items():
        implied = set().union(*(allowed[b] for b in below))
        for target in sorted(below - implied):
            (x, y), (u, v) = place[room], place[target]
            lines.append(
                f'<path d="M{x:.0f} {y + 15:.0f} C{x:.0f} {y + 45:.0f} {u:.0f} {v - 45:.0f} '
                f'{u:.0f} {v - 17:.0f}" marker-end="url(#tip)"/>'
            )
    boxes = [
        f'<rect x="{x - 52:.0f}" y="{y - 15:.0f}" width="104" height="30" rx="6"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}">{room}</text>'
        for room, (x, y) in place.items()
    ]
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
    )
    return (
        f'<div><svg class="rooms" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Rooms and imports">{tip}{"".join(lines)}{"".join(boxes)}</svg></div>'
    )


def _is_dataclass(node: ast.ClassDef) -> bool:
    marks = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return any(_last(mark) == "dataclass" for mark in marks)


def _last(node: ast.AST) -> str:
    """Return the last name of a dotted expression, "" for anything else."""
    if isinstance(node, ast.Subscript):
        return _last(node.value)
    return getattr(node, "attr", None) or getattr(node, "id", None) or ""


def _text(node: ast.AST | None) -> str:
    """Return the text of a docstring statement in one line, "" for any other statement."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def _doc(node: ast.ClassDef) -> str:
    return _paragraphs(ast.get_docstring(node) or "")


def _paragraphs(docstring: str) -> str:
    """Return a docstring as markdown. Indented lines become code."""
    return re.sub(r"(?m)^ {2,3}(?=\S)", "    ", docstring.strip())


def _default(value: ast.expr) -> str:
    """Return a default for people: nothing for None and empty values."""
    if isinstance(value, ast.Call):  # dataclasses.field(default_factory=list)
        return ""
    plain = ast.literal_eval(value)
    return "" if plain in (None, "", ()) else f"`{plain}`"


def _row(cells) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
