"""Quantization of whole models: policies over params, fake quantization and packing."""

from jaxcompress.quantize import presets as presets
from jaxcompress.quantize._dorefa import DoReFa as DoReFa
from jaxcompress.quantize._lsq import LSQ as LSQ
from jaxcompress.quantize._lsq import LSQPlus as LSQPlus
from jaxcompress.quantize._method import Method as Method
from jaxcompress.quantize._method import RoundToNearest as RoundToNearest
from jaxcompress.quantize._pact import PACT as PACT
from jaxcompress.quantize._policy import Coverage as Coverage
from jaxcompress.quantize._policy import Policy as Policy
from jaxcompress.quantize._policy import Rule as Rule
from jaxcompress.quantize._policy import coverage as coverage
from jaxcompress.quantize._policy import fake_quant as fake_quant
from jaxcompress.quantize._policy import pack as pack
from jaxcompress.quantize._policy import unpack as unpack
from jaxcompress.quantize._qat import QAT as QAT
from jaxcompress.quantize._quantizer import STE as STE
from jaxcompress.quantize._quantizer import Quantizer as Quantizer
from jaxcompress.quantize._train import train as train
from jaxcompress.quantize._train_sites import TrainCoverage as TrainCoverage
from jaxcompress.quantize._variables import labels as labels
from jaxcompress.quantize._variables import learnable as learnable
