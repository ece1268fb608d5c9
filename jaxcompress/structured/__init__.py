"""Physical shrinking: channels, heads, widths and layers removed, with a certificate."""

from jaxcompress.structured._certificate import Certificate as Certificate
from jaxcompress.structured._certificate import Distance as Distance
from jaxcompress.structured._certificate import Distances as Distances
from jaxcompress.structured._certificate import Leak as Leak
from jaxcompress.structured._certificate import Size as Size
from jaxcompress.structured._find import groups as groups
from jaxcompress.structured._groups import Group as Group
from jaxcompress.structured._groups import Groups as Groups
from jaxcompress.structured._groups import Member as Member
