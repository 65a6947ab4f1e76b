"""A configuration from a YAML or JSON file, such as a run's own config.json."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from papo_fast.config import Config, ObjectiveConfig
from papo_fast.errors import InputError
from papo_fast.reward_settings import REWARD_NAMES
from papo_fast.setting_bounds import leaves

CONFIG = "config.json"


def as_evaluated(config: Config, model: str) -> Config:
    """A run's configuration for an evaluation of the `model` that it left.

    Of what only a training uses nothing has to be there: files of functions, services, libraries.
    Adapters are a part of the weights that a run leaves, and those of 4 bits are whole there.
    """
    change = dataclasses.replace
    return change(
        config,
        model=change(config.model, path=model, lora_rank=0, quantize="none"),
        reward=change(config.reward, functions=REWARD_NAMES),
        objective=ObjectiveConfig(),
        corruption=change(config.corruption, second=""),
        train=change(config.train, optimizer="adamw"),
        parallel=change(config.parallel, offload_optimizer=False),
    )


def read_settings(file: str | Path) -> dict[str, Any]:
    """What a .yaml, .yml or .json file, or the config.json of a run's folder, holds.

    Raises `InputError` where it cannot be read or holds no mapping.
    """
    path = Path(file)
    path = path / CONFIG if path.is_dir() else path
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise InputError(f"{path}: expected a .yaml, .yml or .json file, or the folder of a run")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    found = _parsed(path, text)
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}, expected settings by name")
    return found


def _parsed(path: Path, text: str) -> Any:
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        return _of_json(text) if kind == "JSON" else _of_yaml(text)
    except (ValueError, RecursionError) as error:  # of YAML also a date that there is not
        raise InputError(f"{path} is not {kind}: {' '.join(str(error).split())}") from error


def _of_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once(key for key, _ in pairs)
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)


def _of_yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            _check_once(key.value for key, _ in node.value if isinstance(key.value, str))
            return node

    try:
        found = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return {} if found is None else found


def _check_once(keys: Iterable[str]) -> None:
    """Both formats would take the last one of a name."""
    twice = [key for key, n in Counter(keys).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]} stands in it twice")


def with_settings(config: Config, settings: Mapping[str, Any], source: str) -> Config:
    """`config` changed by `settings`: nested by section, or by dotted names.

    Raises `InputError` that names the key, and the nearest known one, or what a value should be.
    """
    known = [name for name, _, _ in leaves(config)]
    return _changed(config, settings, "", source, known, set())


def _changed(
    config: Any,
    settings: Mapping[str, Any],
    prefix: str,
    source: str,
    known: list[str],
    given: set[str],
) -> Any:
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        name, _, rest = str(key).partition(".")
        if name not in hints:
            raise InputError(f"{source}: unknown key {prefix}{key}{_nearest(prefix, key, known)}")
        inner = changes.get(name, getattr(config, name))
        where = f"{prefix}{name}"
        if dataclasses.is_dataclass(inner):
            part = {rest: value} if rest else value
            if not isinstance(part, Mapping):
                raise InputError(
                    f"{source}: {where} is {value!r:.80}, expected settings by name, such as "
                    f"{where}.{dataclasses.fields(inner)[0].name}"
                )
            changes[name] = _changed(inner, part, f"{where}.", source, known, given)
        elif rest:
            raise InputError(f"{source}: unknown key {prefix}{key}{_nearest(prefix, key, known)}")
        elif where in given:
            raise InputError(f"{source}: {where} is given twice, by its section and by its name")
        else:
            given.add(where)
            changes[name] = _value(hints[name], value, f"{source}: {where}")
    return dataclasses.replace(config, **changes)


def _nearest(prefix: str, key: Any, known: list[str]) -> str:
    wanted = f"{prefix}{key}"
    names = {name.rpartition(".")[2]: name for name in known}
    last = wanted.rpartition(".")[2]
    near = [names[last]] if last in names else []  # it stands in another section
    near = near or difflib.get_close_matches(wanted, known, 1, 0.5)
    near = near or [names[n] for n in difflib.get_close_matches(last, list(names), 1)]
    return f"; the nearest known one is {near[0]}" if near else ""


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` as a setting of type `hint` holds it."""
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value is None and type(None) in kinds:
        return None
    (kind,) = [k for k in kinds if k is not type(None)]
    if get_origin(kind) is Literal:
        # YAML reads a bare `off` and `on` as truth values
        word = {False: "off", True: "on"}[value] if isinstance(value, bool) else value
        value = word if word in get_args(kind) else value
        if value not in get_args(kind):
            choices = ", ".join(map(str, get_args(kind)))
            raise InputError(f"{where} is {value!r:.80}: expected one of {choices}")
        return value
    if get_origin(kind) is tuple:
        return _tuple(get_args(kind), value, where)
    convert, expected = _PLAIN[kind]
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where} is {value!r:.80}: expected {expected}") from error


def _tuple(parts: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise InputError(f"{where} is {value!r:.80}: expected a list")
    if parts[-1] is not Ellipsis and len(value) != len(parts):
        raise InputError(f"{where} is {value!r:.80}: expected a list of {len(parts)}")
    return tuple(_value(parts[0], x, where) for x in value)


def _text(value: Any) -> str:
    if not isinstance(value, str):  # what YAML reads `no`, `010` or `1.10` as is not what was meant
        raise TypeError
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool) or int(value) != float(value):
        raise TypeError
    return int(value)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)  # YAML reads 1e-6, which has no dot, as a text


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


_PLAIN: dict[Any, tuple[Callable[[Any], Any], str]] = {
    str: (_text, "a text, in quotes if it looks like something else"),
    int: (_integer, "an integer"),
    float: (_number, "a number"),
    bool: (_truth, "true or false"),
}
