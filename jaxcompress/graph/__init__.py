"""Any JAX function as a graph: sites, replay, taps and cost, from its jaxpr.

`trace` finds where a function contracts its parameters, through whatever constructs it uses and
whichever library wrote it; `replay` runs it with chosen equations handled by you.
"""

from jaxcompress.graph.affine._affine import affine as affine
from jaxcompress.graph.affine._bypass import bypass as bypass
from jaxcompress.graph.affine._chain import Chain as Chain
from jaxcompress.graph.cost._cost import cost as cost
from jaxcompress.graph.cost._found import Compiled as Compiled
from jaxcompress.graph.cost._found import Cost as Cost
from jaxcompress.graph.cost._found import Figure as Figure
from jaxcompress.graph.cost._found import Memory as Memory
from jaxcompress.graph.cost._found import SiteCost as SiteCost
from jaxcompress.graph.cost._targets import Target as Target
from jaxcompress.graph.cost._targets import cuda_options as cuda_options
from jaxcompress.graph.dims._found import Dims as Dims
from jaxcompress.graph.dims._kept import Kept as Kept
from jaxcompress.graph.dims._kept import take as take
from jaxcompress.graph.dims._kept import take_by_layer as take_by_layer
from jaxcompress.graph.dims._leaks import Leak as Leak
from jaxcompress.graph.dims._leaks import leaks as leaks
from jaxcompress.graph.dims._remask import remask as remask
from jaxcompress.graph.dims._removed import KeepIndices as KeepIndices
from jaxcompress.graph.dims._resize import resize as resize
from jaxcompress.graph.dims._rule import DimsRule as DimsRule
from jaxcompress.graph.dims._rule import Step as Step
from jaxcompress.graph.dims._rule import register_dims as register_dims
from jaxcompress.graph.dims._walk import dims as dims
from jaxcompress.graph.program._constructs import Body as Body
from jaxcompress.graph.program._constructs import Construct as Construct
from jaxcompress.graph.program._constructs import Enter as Enter
from jaxcompress.graph.program._constructs import register_construct as register_construct
from jaxcompress.graph.program._run import Equation as Equation
from jaxcompress.graph.sites._graph import Contraction as Contraction
from jaxcompress.graph.sites._graph import Graph as Graph
from jaxcompress.graph.sites._graph import Use as Use
from jaxcompress.graph.sites._intercept import UNREACHABLE as UNREACHABLE
from jaxcompress.graph.sites._intercept import Interception as Interception
from jaxcompress.graph.sites._intercept import intercept as intercept
from jaxcompress.graph.sites._observe import observe as observe
from jaxcompress.graph.sites._perturb import perturb as perturb
from jaxcompress.graph.sites._replay import replay as replay
from jaxcompress.graph.sites._sites import Axes as Axes
from jaxcompress.graph.sites._sites import Layout as Layout
from jaxcompress.graph.sites._sites import Site as Site
from jaxcompress.graph.sites._sites import register_site as register_site
from jaxcompress.graph.sites._summary import Row as Row
from jaxcompress.graph.sites._summary import Summary as Summary
from jaxcompress.graph.sites._summary import summary as summary
from jaxcompress.graph.sites._tap import tap as tap
from jaxcompress.graph.sites._trace import Traced as Traced
from jaxcompress.graph.sites._trace import capture as capture
from jaxcompress.graph.sites._trace import contraction_axes as contraction_axes
from jaxcompress.graph.sites._trace import trace as trace
from jaxcompress.graph.sites._views import Factor as Factor
from jaxcompress.graph.sites._views import View as View
from jaxcompress.graph.sites._views import register_view as register_view
