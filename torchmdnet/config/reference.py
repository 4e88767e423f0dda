"""The reference page of all options, written from the option table."""

from __future__ import annotations

import re

from torchmdnet.options import OPTIONS, RENAMED, RETIRED, Option

__all__ = ["options_markdown"]

_PRECEDENCE = """\
Every setting has a key for YAML files and a flag for the command line. Both accept dashes and underscores, flags can
be shortened while they stay unique, and true/false options are written `--derivative`, `--derivative false` or
`--no-derivative`.

A setting comes from the defaults below, then from files, then from flags:

- Files are those of `--conf`, which may be given more than once, and the settings saved with the checkpoint of
  `--load-model`. Of two files the later one on the command line wins, key by key.
- A flag wins over every file, wherever it stands; of two equal flags the later one wins. (Releases up to 3 let a file
  win over the flags before it. Where that would have made a difference, a warning says so.)
- `load_model` inside a file names the weights to continue from, but imports no settings.
- A file is text in UTF-8 of at most 4 MiB, nested at most 64 deep; what goes beyond is refused with its line."""


def options_markdown() -> str:
    """One Markdown table per group of options: key, flag, value, default and meaning."""
    lines = ["# Configuration reference", ""]
    lines += [_PRECEDENCE, ""]
    for group in dict.fromkeys(option.group for option in OPTIONS.values()):
        lines += [f"## {group}", "", "| key | flag | value | default | meaning |", "|---|---|---|---|---|"]
        lines += [_row(option) for option in OPTIONS.values() if option.group == group]
        lines.append("")
    lines += ["## Keys of earlier releases", "", "| key | now |", "|---|---|"]
    lines += [f"| `{old}` | spelt `{new}` |" for old, new in RENAMED.items()]
    lines += [f"| `{key}` | set aside: {reason} |" for key, reason in RETIRED.items()]
    return "\n".join(lines) + "\n"


def _row(option: Option) -> str:
    flag = f"`{option.short}`, `{option.flag}`" if option.short else f"`{option.flag}`"
    if option.type == "bool":
        flag += f", `--no-{option.flag[2:]}`"
    cells = (f"`{option.key}`", flag, _prose(option.expects), f"`{option.default}`", _prose(option.help))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _prose(text: str) -> str:
    """Text that means the same in Markdown: ``val_total_<loss>`` is neither emphasis nor HTML."""
    return re.sub(r"([_*`\[])", r"\\\1", text).replace("<", "&lt;")
