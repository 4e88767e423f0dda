"""The reference page."""

from __future__ import annotations

from torchmdnet.config import OPTIONS, options_markdown


def test_every_option_has_a_row_with_flag_default_and_meaning():
    page = options_markdown()
    for option in OPTIONS.values():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{option.key}` |")]
        cells = [cell.strip() for cell in row.replace("\\|", "/").strip("|").split("|")]
        assert len(cells) == 5
        assert option.flag in cells[1]
        assert cells[3] == f"`{option.default}`"
        assert cells[4]
    assert "`check_errors`" in page
