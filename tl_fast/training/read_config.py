"""A run's config from a command line and YAML recipes, and back to YAML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from tl_fast.system.mistakes import InputError
from tl_fast.training.run_config import RunConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the strings below the fields are what --help prints

Config = TypeVar("Config", bound=RunConfig)


class _Parser(ArgumentParser):
    """A parser that answers mistakes with one sentence, not with the usage of seventy options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        message = re.sub(r"\s*\n\s*", " ", message).strip()
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse_command(
    kind: type[Config], arguments: Sequence[str] | None, prog: str, description: str
) -> tuple[Config, bool]:
    """The config of a command line, as `config.parse_config` has it; and whether `--traceback` is given. It then raises
    InputError for values out of range. prog, description: what messages call the command, what --help says of it."""
    parser = _Parser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="YAML recipe; later flags and files override earlier ones")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was met")
    parser.add_class_arguments(kind)
    values = parser.parse_args(arguments).as_dict()
    values.pop("config")
    traceback = values.pop("traceback")
    try:
        return kind(**values), traceback
    except InputError as error:
        if traceback:
            raise
        parser.error(str(error))


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved config as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
