"""What multiplies codes: one table of kernels, by backend, primitive and formats."""

from jaxcompress.quantize.kernels._table import Choice as Choice
from jaxcompress.quantize.kernels._table import choose_kernel as choose_kernel
from jaxcompress.quantize.kernels._table import run_kernel as run_kernel
