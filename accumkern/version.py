"""The version, where the build, the extension's check and the package read it."""

__version__ = "0.1.0"
