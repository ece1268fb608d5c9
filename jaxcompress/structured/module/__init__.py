"""A Flax module's own class again, at the widths that are left. Loaded, with Flax, when used."""

from jaxcompress.structured.module._to_module import Rebuilt as Rebuilt
from jaxcompress.structured.module._to_module import to_module as to_module
