"""Configs as a person reads them: TOML with a list on one line, where each value came from, what each key means."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dist_ssl.config.methods import METHODS
from dist_ssl.config.section import UserError
from dist_ssl.config.sections import Config


class Key(NamedTuple):
    """A leaf of the config: what stands in a file as `name` under the table of its section."""

    section: str  # "model.head"
    name: str
    field: FieldInfo
    methods: tuple[str, ...] = ()  # of [objective]: which have this key so; empty where all do

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}" if self.section else self.name


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[Key]:
    """Every key that a file may hold, in the order of the sections."""
    for name, field in model.model_fields.items():
        if field.discriminator is not None:
            yield from _keys_of_methods(name)
            continue
        items = get_args(field.annotation) if get_origin(field.annotation) is list else ()
        if any(map(_is_section, items)):
            yield Key(prefix, name, field)  # a list of tables: it may stand in a line, and its tables have keys
        sections = [part for part in [*_parts(field.annotation), *items] if _is_section(part)]
        for section in sections:
            yield from known_keys(section, f"{prefix}.{name}" if prefix else name)
        if not sections:
            yield Key(prefix, name, field)


def _keys_of_methods(section: str) -> Iterator[Key]:
    """The keys of all methods, those that are alike (type, default, description) once."""
    alike: dict[str, tuple[str, FieldInfo, list[str]]] = {}
    for method, model in METHODS.items():
        for name, field in model.model_fields.items():
            identity = name if name == "name" else f"{name} {field!r}"
            alike.setdefault(identity, (name, field, []))[2].append(method)
    for name, field, methods in sorted(alike.values(), key=lambda one: (one[0] != "name", len(one[2]) < len(METHODS))):
        if name == "name":
            any_method: Any = Literal[tuple(METHODS)]
            field = FieldInfo(annotation=any_method, default=field.default, description=field.description)
        yield Key(section, name, field, () if len(methods) == len(METHODS) else tuple(methods))


def dumps(config: Config) -> str:
    """The complete config as TOML; keys whose value is None are left out, which reads back the same."""
    return _toml(config.model_dump(mode="json", exclude_none=True), lambda key: "")


def dumps_with_origins(config: Config, origins: dict[str, str]) -> str:
    """As `dumps`, with "file", "--set" or "default" at the end of each line, and a comment for each key that is unset.

    `origins` maps dotted keys to where they came from; what it does not hold is a default.
    """
    values = config.model_dump(mode="json", exclude={"lab"} if config.lab is None else None)
    return _toml(values, lambda key: origins.get(key, "default"))


def override(key: str, value: Any) -> str:
    """`section.key=value` as `load` and `with_overrides` take it, the value as TOML."""
    return f"{key}={_inline(value)}"


def explain(section: str | None = None) -> list[str]:
    """A line for each key, or for those of one section: key, type, default, description, in columns.

    A key of some methods only is followed by their names. Raises UserError for a section that is not there.
    """
    keys = [key for key in known_keys() if section is None or f"{key.dotted}.".startswith(f"{section}.")]
    if not keys:
        raise UserError(f"--explain {section}: expected a section, one of {', '.join(Config.model_fields)}")
    dotted = [f"{key.dotted} ({', '.join(key.methods)})" if key.methods else key.dotted for key in keys]
    rows = [(name, _type_of(key.field), _default_of(key.field)) for name, key in zip(dotted, keys, strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)), key.field.description or ""])
        for key, row in zip(keys, rows, strict=True)
    ]


def explain_page() -> str:
    """All keys as a page of Markdown, a table a section: docs/config.md."""
    lines = [
        "# Every key of a config",
        "",
        "Made by `dist-ssl config --markdown > docs/config.md`; `dist-ssl config --explain SECTION` prints the same.",
    ]
    section = None
    for key in known_keys():
        if key.section != section:
            section = key.section
            lines += ["", f"## [{section}]", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        name = f"`{key.name}`" + (f" ({', '.join(key.methods)})" if key.methods else "")
        cells = (name, _type_of(key.field), f"`{_default_of(key.field)}`", key.field.description or "")
        lines.append(f"| {' | '.join(cell.replace('|', '/').replace('<', '&lt;') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def choices(dotted: str) -> list[str]:
    """The words that a key takes, or that a list of it may hold."""
    field = next(key.field for key in known_keys() if key.dotted == dotted)
    return [
        word
        for part in [field.annotation, *get_args(field.annotation)]
        for word in get_args(part)
        if word and isinstance(word, str)
    ]


def _toml(values: dict[str, Any], comment: Callable[[str], str], table: tuple[str, ...] = ()) -> str:
    """A table and those inside it. tomli_w writes the scalars; it would give each item of a list a line of its own."""
    lines, tables = [], []
    for name, value in values.items():
        if isinstance(value, dict):
            tables.append(_toml(value, comment, (*table, name)))
        elif value is None:
            lines.append(f"# {name} is not set")
        else:
            line, said = f"{_key(name)} = {_inline(value)}", comment(".".join((*table, name)))
            lines.append(f"{line:<39} # {said}" if said else line)
    if table and (lines or not tables):
        lines.insert(0, f"[{'.'.join(map(_key, table))}]")
    own = "".join(f"{line}\n" for line in lines)
    return "\n".join(part for part in (own, *tables) if part)


def _inline(value: Any) -> str:
    match value:
        case list():
            return f"[{', '.join(map(_inline, value))}]"
        case dict():
            return f"{{ {', '.join(f'{_key(name)} = {_inline(v)}' for name, v in value.items() if v is not None)} }}"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def _key(name: str) -> str:
    """As it stands left of an equals sign: quoted where TOML wants that."""
    return tomli_w.dumps({name: 0}).removesuffix(" = 0\n")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _parts(annotation: Any) -> list[Any]:
    """The members of a union, or the one type."""
    return list(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else [annotation]


def _type_of(field: FieldInfo) -> str:
    bounds, parts = [], _parts(field.annotation)
    inside = [bound for part in parts for info in getattr(part, "__metadata__", ()) for bound in info.metadata]
    for bound in [*field.metadata, *inside]:
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
            if (limit := getattr(bound, name, None)) is not None:
                bounds.append(f"{sign} {limit:g}" if isinstance(limit, float) or limit < 2**53 else f"{sign} 2^63")
    name = " | ".join(_name_of(part) for part in parts if part is not types.NoneType)
    return " ".join([name, ", ".join(bounds)]).strip()


def _name_of(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _name_of(get_args(annotation)[0])
    if get_origin(annotation) in (list, tuple):
        inner = [_name_of(part) for part in get_args(annotation)]
        return f"{len(inner)} x {inner[0]}" if get_origin(annotation) is tuple else f"list of {inner[0]}"
    if len(parts := _parts(annotation)) > 1:
        return " | ".join(dict.fromkeys(map(_name_of, parts)))
    is_table = get_origin(annotation) is dict or _is_section(annotation)
    return "table" if is_table else getattr(annotation, "__name__", str(annotation))


def _default_of(field: FieldInfo) -> str:
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "unset" if value is None else _inline(value)
