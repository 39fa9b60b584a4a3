"""What docs/stages.md takes from the code: each stage and setting, as the JSON Schema of pipeline files has them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, get_type_hints

from compressor.config.chain import find_stage
from compressor.config.installed_stages import describe_stages, stage_names
from compressor.config.pipeline_file import json_schema

Schema: TypeAlias = Mapping[str, Any]

RANGES = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}


def reference() -> str:
    """The stages as a table, the keys of a file, each stage with its settings, and the settings that stages share."""
    file = json_schema()
    definitions = file["definitions"]
    titles = {name: name for name in definitions}
    for name, schema in definitions["Losses"]["properties"].items():  # YAML names a loss by its key, not by its class
        titles |= dict.fromkeys(find_references(schema), name)
    overview = ["| stage | what it does | takes → gives |", "|---|---|---|"]
    sections = []
    for listing in describe_stages():
        if listing.origin.startswith("compressor "):
            stage = find_stage(listing.name, stage_names())
            hints = get_type_hints(stage.apply)
            taken, given = (name_type(hints[name]) for name in ("model", "return"))
            overview.append(f"| [`{listing.name}`](#{listing.name}) | {listing.summary} | {taken} → {given} |")
            titles[stage.__name__] = listing.name
            sections.append(describe(definitions[stage.__name__], listing.name, definitions, titles))
            del definitions[stage.__name__]
    shared = [
        describe(one, titles[name], definitions, titles) for name, one in definitions.items() if "properties" in one
    ]
    whole = describe(file, "A pipeline file", definitions, titles)
    return "\n\n".join(["\n".join(overview), whole, *sections, *shared])


def name_type(annotation: Any) -> str:
    """The classes of an annotation, such as `TorchModel or OnnxModel`."""
    return " or ".join(part.__name__ for part in getattr(annotation, "__args__", [annotation]))


def describe(definition: Schema, title: str, definitions: Mapping[str, Schema], titles: Mapping[str, str]) -> str:
    """A class of settings: its docstring, and a table of its keys."""
    keys = {name: schema for name, schema in definition["properties"].items() if name != "stage"}
    lines = [f"## {title}", "", definition.get("description", "").replace("\n\n", "\n"), ""]
    if keys:
        lines += ["| key | value | default | what it means |", "|---|---|---|---|"]
    for name, schema in keys.items():
        required = name in definition.get("required", ())
        default = "required" if required else show_default(schema, definitions)
        lines.append(f"| `{name}` | {show_type(schema, titles)} | {default} | {explain(schema, definitions)} |")
    return "\n".join(lines).rstrip()


def explain(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """What a key means: as its own docstring says, or that of the class of its value."""
    told = [schema.get("description", "")]
    if not takes_number(schema):
        told += [definitions[target].get("description", "").partition("\n")[0] for target in find_references(schema)]
    return " ".join(next(filter(None, told), "").split()).replace("|", "\\|")


def takes_number(schema: Schema) -> bool:
    """Whether a plain number may stand there, so that the class of another value does not say what the key means."""
    return any(part.get("type") in ("number", "integer") for part in schema.get("anyOf", ()))


def find_references(schema: Schema) -> Iterator[str]:
    """Names of the classes that the value of a key may be of."""
    for part in (schema, *schema.get("anyOf", ())):
        if "$ref" in part:
            yield part["$ref"].rpartition("/")[2]


def show_type(schema: Schema, titles: Mapping[str, str]) -> str:
    """What may stand as the value of a key, in words."""
    match schema:
        case {"$ref": target}:
            title = titles[target.rpartition("/")[2]]
            return f"[{title}](#{title.lower().replace(' ', '-')})"
        case {"anyOf": parts}:
            return " or ".join(show_type(part, titles) for part in parts if part.get("type") != "null")
        case {"enum": values} | {"const": values}:
            return ", ".join(f"`{value}`" for value in (values if isinstance(values, list) else [values]))
        case {"type": "array", "items": dict() as items}:
            return f"list of {show_type(items, titles)}"
        case {"type": "object", "additionalProperties": dict() as values}:
            return f"mapping to {show_type(values, titles)}"
    limits = [f"{sign} {schema[name]}" for name, sign in RANGES.items() if name in schema]
    return " ".join([schema.get("type", "anything"), " and ".join(limits)]).strip()


def show_default(schema: Schema, definitions: Mapping[str, Schema]) -> str:
    """What holds where a key is left out; of a mapping, what departs from the defaults of its own keys."""
    default = schema.get("default")
    if default is None or default in ([], {}):
        return ""
    targets = list(find_references(schema))
    if isinstance(default, dict) and targets:
        default = departures(default, definitions[targets[0]], definitions)
    return f"`{json.dumps(default, ensure_ascii=False)}`".replace('"', "")


def departures(value: Mapping[str, Any], definition: Schema, definitions: Mapping[str, Schema]) -> dict[str, Any]:
    """The part of a mapping that its class does not give by itself."""
    found = {}
    for name, part in value.items():
        schema = definition["properties"][name]
        if part != schema.get("default"):
            targets = list(find_references(schema))
            inner = isinstance(part, dict) and targets
            found[name] = departures(part, definitions[targets[0]], definitions) if inner else part
    return found
