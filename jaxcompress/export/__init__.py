"""Params, masks and QArrays in one small file: a valid safetensors file, checked on opening.

`docs/file_format.md` describes the layout, so that others can read it.
"""

from jaxcompress.export._file import FileInfo as FileInfo
from jaxcompress.export._file import Loaded as Loaded
from jaxcompress.export._file import load as load
from jaxcompress.export._file import save as save
from jaxcompress.export._formats import allow as allow
