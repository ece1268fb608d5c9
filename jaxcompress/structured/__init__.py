"""Physical shrinking: channels, heads, widths and layers removed, with a certificate."""

from jaxcompress.structured._blocks import Block as Block
from jaxcompress.structured._blocks import Blocks as Blocks
from jaxcompress.structured._blocks import Layer as Layer
from jaxcompress.structured._blocks import blocks as blocks
from jaxcompress.structured._certificate import Certificate as Certificate
from jaxcompress.structured._certificate import Distance as Distance
from jaxcompress.structured._certificate import Distances as Distances
from jaxcompress.structured._certificate import Leak as Leak
from jaxcompress.structured._certificate import Size as Size
from jaxcompress.structured._choose_layers import choose_layers as choose_layers
from jaxcompress.structured._depth import drop_layers as drop_layers
from jaxcompress.structured._depth import rebuild_layers as rebuild_layers
from jaxcompress.structured._dropped import Dropped as Dropped
from jaxcompress.structured._gate import SparseGatesState as SparseGatesState
from jaxcompress.structured._gate import gate as gate
from jaxcompress.structured._gate import gate_scores as gate_scores
from jaxcompress.structured._gate import sparse_gates as sparse_gates
from jaxcompress.structured._groups import Group as Group
from jaxcompress.structured._groups import Groups as Groups
from jaxcompress.structured._groups import Member as Member
from jaxcompress.structured._influence import block_influence as block_influence
from jaxcompress.structured._influence import influence as influence
from jaxcompress.structured._influence import loss_change as loss_change
