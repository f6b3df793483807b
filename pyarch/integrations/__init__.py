"""pyarch inside other libraries, which are optional: each is imported when its integration is asked for."""

from pyarch.integrations import transformers

__all__ = ["transformers"]
