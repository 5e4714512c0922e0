"""The version, alone in a module so that the build reads it without importing torch."""

__version__ = "0.1.0"

#: Of the library: modules of its classes begin with it.
PACKAGE = __name__.partition(".")[0]
