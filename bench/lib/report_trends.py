"""The old name of lib/quality_tables.py for bench/paper; goes when its imports are renamed."""

from lib.quality_tables import statement, title, trends_table

__all__ = ["statement", "title", "trends_table"]
