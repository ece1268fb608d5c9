"""Quantization of whole models: policies over params, fake quantization and packing."""

from jaxcompress.quantize import presets as presets
from jaxcompress.quantize._bias import bias_shift as bias_shift
from jaxcompress.quantize._clip import ClipSearch as ClipSearch
from jaxcompress.quantize._clip import clip_search as clip_search
from jaxcompress.quantize._gptq import GPTQ as GPTQ
from jaxcompress.quantize._gptq import gptq as gptq
from jaxcompress.quantize._method import Method as Method
from jaxcompress.quantize._method import RoundToNearest as RoundToNearest
from jaxcompress.quantize._policy import Coverage as Coverage
from jaxcompress.quantize._policy import Policy as Policy
from jaxcompress.quantize._policy import Rule as Rule
from jaxcompress.quantize._policy import coverage as coverage
from jaxcompress.quantize._policy import fake_quant as fake_quant
from jaxcompress.quantize._policy import pack as pack
from jaxcompress.quantize._policy import unpack as unpack
