"""dist-moe config: check and show a configuration."""

from __future__ import annotations

import argparse

from dist_moe.cli.commands import Commands, add_config
from dist_moe.config.files import json_text
from dist_moe.errors import UserError


def add_to(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    config = commands.add_parser("config", help="check and show a configuration, or list its fields")
    add_config(config, nargs="?")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.add_argument(
        "--fields", nargs="?", const="", metavar="PREFIX", help="list all fields, or those that begin with PREFIX"
    )
    config.add_argument("--list", action="store_true", help="list the configurations that the package has")
    config.add_argument("--schema", action="store_true", help="print all fields as a JSON schema")
    config.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dist_moe.config.listing import field_listing
    from dist_moe.config.packaged import packaged_listing
    from dist_moe.config.plain_yaml import read_yaml, yaml_text
    from dist_moe.config.validation import import_modules
    from dist_moe.recipes import RECIPES, load_config
    from dist_moe.recipes.recipe import configuration_of

    if options.list:
        print(packaged_listing())
        return 0
    content = read_yaml(options.config) if options.config is not None else {}
    if options.fields is not None or options.schema:
        import_modules(content.get("imports"))  # what they register is listed too
    if options.fields is not None:
        every = dict.fromkeys(recipe.configuration for recipe in RECIPES.classes)
        chosen = [configuration_of(content["recipe"])] if "recipe" in content else list(every)
        print(field_listing(chosen, options.fields))
        return 0
    if options.schema:
        print(json_text(configuration_of(content.get("recipe")).model_json_schema()).rstrip())
        return 0
    if options.config is None:
        raise UserError("name a configuration to check, or ask for --fields or --list")
    config = load_config(options.config, options.overrides)
    config.check(config.parallel.expert_parallel_size)
    print(yaml_text(config.plain()), end="")
    return 0
