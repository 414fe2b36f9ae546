"""The front door: command line, scenario files, plans as files, reports and engine exports."""

__version__ = "0.1.0"
__all__ = ["__version__"]
