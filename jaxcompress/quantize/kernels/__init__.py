"""What multiplies codes: one table of kernels, by backend, primitive and formats."""

from jaxcompress.quantize.kernels._table import Choice as Choice
from jaxcompress.quantize.kernels._table import choose as choose
from jaxcompress.quantize.kernels._table import run as run
