"""Odd configurations: files that are changed, overrides, and every field with extreme values."""

from __future__ import annotations

import importlib
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_moe.config.listing import fields_of
from dist_moe.recipes import RECIPES, load_config
from dist_moe.recipes.recipe import validate_config
from tools.fuzzing.case import Area, Case
from tools.fuzzing.mutate import ODD_CELLS, ODD_VALUES, odd_bytes, odd_file, odd_json, words

yaml: Any = importlib.import_module("yaml")
"""A reader of its own: the product reads YAML in one place alone, which is what is tried here."""

REPOSITORY = Path(__file__).resolve().parents[2]


class _Naive(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's own reading, but for dates, which YAML 1.2 has not."""


_Naive.yaml_implicit_resolvers = {
    first: [one for one in resolvers if one[0] != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
ODD_YAML = (
    *("2024-13-45", "!!int abc", "!!float x", "!!python/object:os.system x", "!!binary x", "!!timestamp x", "&a [*a]"),
    *words("*nobody { [1 ' ~ 1e-3 1e3 0o17 0b1 1:30 yes off .inf -.inf .nan 1_000 2001-01-01 \t"),
    *("<<: 1", "? a", "a: b: c", "---\na: 1", "|\n x", "[" * 2000, "{a: " * 600, "9" * 4400),
)


def assigned(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no section by its dotted name."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from assigned(value, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), content


def difference(naive: Any, config: Any) -> str | None:
    """Return which number that was given is another in the configuration; None if there is none."""
    plain = dict(assigned(config.plain()))
    for name, value in assigned(naive):
        found = plain.get(name)
        if type(value) in (int, float) and type(found) in (int, float):
            if float(value) != float(found) and not (math.isnan(value) and math.isnan(found)):
                return f"{name}={value!r} is read as {found!r}"
        elif type(value) is bool and type(found) is bool and value != found:
            return f"{name}={value!r} is read as {found!r}"
    again = validate_config(config.plain())
    return None if repr(again.plain()) == repr(config.plain()) else "written and read again it is another"


class YamlArea(Area):
    """Configuration files whose text or values are changed."""

    name = "yaml"

    def prepare(self) -> None:
        """Nothing is made: the repository's own configurations are changed."""

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Change a configuration."""
        path, source = user / "config.yaml", drawn.choice(CONFIGS)
        path.write_bytes(source.read_bytes())
        kind = drawn.choices(["none", "kind", "bytes", "value", "line", "bomb"], [1, 2, 4, 8, 8, 1])[0]
        what = kind
        if kind == "kind":
            what = odd_file(path, drawn)
        elif kind == "bytes":
            what = odd_bytes(path, drawn)
        elif kind == "value":
            content, what = odd_json(yaml.safe_load(path.read_text(encoding="utf-8")), drawn)
            path.write_text(json.dumps(content) if drawn.random() < 0.5 else yaml.safe_dump(content), encoding="utf-8")
        elif kind == "line":
            what = self._line(path, drawn)
        elif kind == "bomb":
            what = "aliases that multiply"
            levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
            path.write_text("\n".join(["a0: &a0 [x]", *levels]), encoding="utf-8")

        def check(config: Any) -> str | None:
            try:
                naive = yaml.load(path.read_text(encoding="utf-8"), _Naive)
            except (yaml.YAMLError, ValueError):
                return "PyYAML does not read it"
            return difference(naive, config)

        return Case(f"{source.name}: {what}", lambda: load_config(path), check, "accept" if kind == "none" else None)

    @staticmethod
    def _line(path: Path, drawn: random.Random) -> str:
        lines = path.read_text(encoding="utf-8").splitlines()
        at = drawn.randrange(len(lines))
        key, _, _ = lines[at].partition(":")
        odd = drawn.choice((*ODD_YAML, *ODD_CELLS))
        ways: dict[str, Callable[[], list[str]]] = {
            f"value {odd[:30]!r}": lambda: [f"{key}: {odd}"],
            "twice": lambda: [lines[at], lines[at]],
            "missing": list,
            "indented": lambda: [f"  {lines[at]}"],
            "tab": lambda: [f"\t{lines[at]}"],
            "another key": lambda: [f"{key}x: 1"],
        }
        what = drawn.choice([next(iter(ways)), *ways])
        path.write_text(
            "\n".join([*lines[:at], *ways[what](), *lines[at + 1 :], ""]), errors="surrogatepass", encoding="utf-8"
        )
        return f"line {at + 1}: {what}"


class OverridesArea(Area):
    """Texts ``key=value`` behind a configuration."""

    name = "overrides"

    def prepare(self) -> None:
        """List the fields of all recipes, and those that each configuration has, once."""
        named = {field.name for recipe in RECIPES.classes for field in fields_of(recipe.configuration)}
        listed = {path.name: [name for name, _ in assigned(load_config(path).plain())] for path in CONFIGS}
        (self.base / "fields.json").write_text(json.dumps(listed | {"": sorted(named)}), encoding="utf-8")

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Draw one override or two."""
        source, names = _configuration_and_names(self.base, drawn)
        texts = [self._text(names, drawn) for _ in range(drawn.choice([1, 1, 2]))]

        def check(config: Any) -> str | None:
            naive = {}
            for text in texts:
                key, _, value = text.partition("=")
                try:
                    naive[key] = json.loads(value)
                except ValueError:
                    naive[key] = None
            return difference(naive, config)

        shown = ", ".join(text[:80] for text in texts)
        return Case(f"{source.name} {shown}", lambda: load_config(source, texts), check)

    @staticmethod
    def _text(names: list[str], drawn: random.Random) -> str:
        name = drawn.choice(names)
        odd = drawn.choice((*ODD_YAML, *ODD_CELLS))
        if drawn.random() < 0.3:
            value = drawn.choice(ODD_VALUES)
            odd = "9" * 5000 if isinstance(value, int) and value.bit_length() > 10_000 else json.dumps(value)
        chance = drawn.random()
        if chance < 0.05:
            return drawn.choice(["", "=", "=1", "..=1", name, f"{name}.x=1", f".{name}=1", f"{name}==1"])
        return f"{name.replace('[]', '')}={odd}"


def _configuration_and_names(base: Path, drawn: random.Random) -> tuple[Path, list[str]]:
    """Return a configuration, and names of fields: now of those that it has, now of all that there are."""
    listed, source = json.loads((base / "fields.json").read_text(encoding="utf-8")), drawn.choice(CONFIGS)
    return source, listed[drawn.choice(["", source.name])]


class FieldsArea(Area):
    """Every field with extreme values, up to all checks that need no data."""

    name = "fields"
    EXTREMES = (
        *words("0 -1 1 2 0.5 -0.0 1.0 1e-320 1e23 1e308 1e309 .inf -.inf .nan 1000000000000 2147483648 4294967296"),
        *words("9223372036854775807 9223372036854775808 true false null auto '' x [] {} [1] {name:x} [[1,2]]"),
        "{name: x}",
    )

    def prepare(self) -> None:
        """List the same fields as for overrides."""
        OverridesArea.prepare(self)  # type: ignore[arg-type]

    def case(self, drawn: random.Random, user: Path, ours: Path) -> Case:
        """Set a field or two to extremes."""
        source, names = _configuration_and_names(self.base, drawn)
        given = {
            drawn.choice(names).replace("[]", ""): drawn.choice(self.EXTREMES) for _ in range(drawn.choice([1, 1, 2]))
        }
        texts = [f"{name}={value}" for name, value in given.items()]

        def run() -> Any:
            config = load_config(source, texts)
            config.check(config.parallel.expert_parallel_size)
            return config

        def check(config: Any) -> str | None:
            plain = dict(assigned(config.plain()))
            for place, (name, value) in enumerate(given.items()):
                if any(name.startswith(f"{later}.") for later in list(given)[place + 1 :]):
                    continue  # the whole section was set afterwards
                found = plain.get(name)
                try:
                    number = float(value)
                except ValueError:
                    continue
                if type(found) in (int, float) and float(found) != number and not math.isnan(number):
                    return f"{name}={value} is read as {found!r}"
            return None

        return Case(f"{source.name} {' '.join(texts)}", run, check)
