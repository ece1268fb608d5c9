"""Any JAX function as a graph: sites, replay, taps and cost, from its jaxpr.

`trace` finds where a function contracts its parameters, through whatever constructs it uses and
whichever library wrote it; `replay` runs it with chosen equations handled by you.
"""

from jaxcompress.graph import _dims_contract as _dims_contract
from jaxcompress.graph import _dims_linalg as _dims_linalg
from jaxcompress.graph import _dims_made as _dims_made
from jaxcompress.graph import _dims_rules as _dims_rules
from jaxcompress.graph._affine import affine as affine
from jaxcompress.graph._bypass import bypass as bypass
from jaxcompress.graph._chain import Chain as Chain
from jaxcompress.graph._constructs import Body as Body
from jaxcompress.graph._constructs import Construct as Construct
from jaxcompress.graph._constructs import Enter as Enter
from jaxcompress.graph._constructs import register_construct as register_construct
from jaxcompress.graph._cost import Compiled as Compiled
from jaxcompress.graph._cost import Cost as Cost
from jaxcompress.graph._cost import SiteCost as SiteCost
from jaxcompress.graph._cost import cost as cost
from jaxcompress.graph._cost_figures import Figure as Figure
from jaxcompress.graph._cost_figures import Memory as Memory
from jaxcompress.graph._dims import dims as dims
from jaxcompress.graph._dims_found import Dims as Dims
from jaxcompress.graph._dims_step import DimsRule as DimsRule
from jaxcompress.graph._dims_step import Step as Step
from jaxcompress.graph._dims_step import register_dims as register_dims
from jaxcompress.graph._graph import Contraction as Contraction
from jaxcompress.graph._graph import Graph as Graph
from jaxcompress.graph._graph import Use as Use
from jaxcompress.graph._intercept import UNREACHABLE as UNREACHABLE
from jaxcompress.graph._intercept import Interception as Interception
from jaxcompress.graph._intercept import intercept as intercept
from jaxcompress.graph._kept import Kept as Kept
from jaxcompress.graph._kept import take as take
from jaxcompress.graph._kept import take_by_layer as take_by_layer
from jaxcompress.graph._leaks import Leak as Leak
from jaxcompress.graph._leaks import leaks as leaks
from jaxcompress.graph._observe import observe as observe
from jaxcompress.graph._observe import perturb as perturb
from jaxcompress.graph._observe import tap as tap
from jaxcompress.graph._remask import remask as remask
from jaxcompress.graph._removed import KeepIndices as KeepIndices
from jaxcompress.graph._replay import Equation as Equation
from jaxcompress.graph._replay import replay as replay
from jaxcompress.graph._resize import resize as resize
from jaxcompress.graph._sites import Axes as Axes
from jaxcompress.graph._sites import Layout as Layout
from jaxcompress.graph._sites import Site as Site
from jaxcompress.graph._sites import register_site as register_site
from jaxcompress.graph._summary import Row as Row
from jaxcompress.graph._summary import Summary as Summary
from jaxcompress.graph._summary import summary as summary
from jaxcompress.graph._targets import Target as Target
from jaxcompress.graph._targets import cuda_options as cuda_options
from jaxcompress.graph._trace import contraction_axes as contraction_axes
from jaxcompress.graph._trace import trace as trace
from jaxcompress.graph._views import Factor as Factor
from jaxcompress.graph._views import View as View
from jaxcompress.graph._views import register_view as register_view
