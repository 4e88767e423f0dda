"""Write docs/configuration.md from the option table.

python tools/build_docs_reference.py
"""

from __future__ import annotations

from pathlib import Path

from torchmdnet.config import options_markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

if __name__ == "__main__":
    PAGE.write_text(options_markdown(), encoding="utf-8")
    print(f"wrote {PAGE}")
