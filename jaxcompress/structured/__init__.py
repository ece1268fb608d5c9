"""Physical shrinking: channels, heads, widths and layers removed, with a certificate."""

from jaxcompress.structured._activation_norm import ActivationNorm as ActivationNorm
from jaxcompress.structured._certificate import Certificate as Certificate
from jaxcompress.structured._certificate import Distance as Distance
from jaxcompress.structured._certificate import Distances as Distances
from jaxcompress.structured._certificate import Leak as Leak
from jaxcompress.structured._certificate import Size as Size
from jaxcompress.structured._fisher import Fisher as Fisher
from jaxcompress.structured._fpgm import FPGM as FPGM
from jaxcompress.structured._groups import Group as Group
from jaxcompress.structured._groups import Groups as Groups
from jaxcompress.structured._groups import Member as Member
from jaxcompress.structured._importance import Normalize as Normalize
from jaxcompress.structured._importance import Reduce as Reduce
from jaxcompress.structured._importance import importance as importance
from jaxcompress.structured._lamp import LAMP as LAMP
from jaxcompress.structured._magnitude import Magnitude as Magnitude
from jaxcompress.structured._method import Given as Given
from jaxcompress.structured._method import Method as Method
from jaxcompress.structured._obd import OBD as OBD
from jaxcompress.structured._random import Random as Random
from jaxcompress.structured._scales import BatchNormScale as BatchNormScale
from jaxcompress.structured._scales import scales as scales
from jaxcompress.structured._taylor import Taylor as Taylor
from jaxcompress.structured._wanda import Wanda as Wanda
