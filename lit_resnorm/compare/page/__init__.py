"""One self-contained HTML page of a comparison: opens from disk, asks no network."""

from lit_resnorm.compare.page.writing import page_text, write_page

__all__ = ["page_text", "write_page"]
