"""Physical shrinking: channels, heads, widths and layers removed, with a certificate."""

from jaxcompress.budget import Bytes as Bytes
from jaxcompress.budget import Flops as Flops
from jaxcompress.budget import Params as Params
from jaxcompress.budget import Seconds as Seconds
from jaxcompress.structured._certificate import Certificate as Certificate
from jaxcompress.structured._certificate import Distance as Distance
from jaxcompress.structured._certificate import Distances as Distances
from jaxcompress.structured._certificate import Leak as Leak
from jaxcompress.structured._certificate import Size as Size
from jaxcompress.structured._choose import choose as choose
from jaxcompress.structured._find import groups as groups
from jaxcompress.structured._groups import Group as Group
from jaxcompress.structured._groups import Groups as Groups
from jaxcompress.structured._groups import Member as Member
from jaxcompress.structured._keep import Keep as Keep
from jaxcompress.structured._keep import keep as keep
from jaxcompress.structured._shrink import mask_params as mask_params
from jaxcompress.structured._shrink import rebuild as rebuild
from jaxcompress.structured._shrink import shrink as shrink
from jaxcompress.structured._shrink import slice_params as slice_params
from jaxcompress.structured._state import StateReport as StateReport
from jaxcompress.structured._state import shrink_state as shrink_state
