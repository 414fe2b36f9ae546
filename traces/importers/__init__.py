"""Routing and loads from the files of other tools."""

from traces.importers.formats import FORMATS, detect, import_file

__all__ = ["FORMATS", "detect", "import_file"]
