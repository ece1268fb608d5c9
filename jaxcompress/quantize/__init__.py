"""Quantization of whole models: policies over params, fake quantization and packing."""

from jaxcompress.quantize import presets as presets
from jaxcompress.quantize._bias import bias_shift as bias_shift
from jaxcompress.quantize._clip import ClipSearch as ClipSearch
from jaxcompress.quantize._clip import clip_search as clip_search
from jaxcompress.quantize._execute import SiteKernel as SiteKernel
from jaxcompress.quantize._execute import execute as execute
from jaxcompress.quantize._execute import site_kernels as site_kernels
from jaxcompress.quantize._fold import fold_norm as fold_norm
from jaxcompress.quantize._fold import foldable as foldable
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
from jaxcompress.quantize._ptq import QResult as QResult
from jaxcompress.quantize._ptq import ptq as ptq
from jaxcompress.quantize._report import QLeaf as QLeaf
from jaxcompress.quantize._report import QReport as QReport
