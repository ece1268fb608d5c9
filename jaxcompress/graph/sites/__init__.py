"""Sites: where a function contracts its leaves or looks them up, and what can be done there."""

from jaxcompress.graph.sites._forms import Form as Form
from jaxcompress.graph.sites._forms import form_at as form_at
from jaxcompress.graph.sites._forms import form_of as form_of
from jaxcompress.graph.sites._forms import replicated as replicated
from jaxcompress.graph.sites._intercept import SiteLayer as SiteLayer
from jaxcompress.graph.sites._intercept import run_layers as run_layers
from jaxcompress.graph.sites._observe import Observer as Observer
from jaxcompress.graph.sites._observe import check_observers as check_observers
from jaxcompress.graph.sites._observe import observing as observing
from jaxcompress.graph.sites._perturb import perturbing as perturbing
from jaxcompress.graph.sites._replay import SitesAt as SitesAt
from jaxcompress.graph.sites._replay import call as call
from jaxcompress.graph.sites._replay import execute_plan as execute_plan
from jaxcompress.graph.sites._replay import make_plan as make_plan
from jaxcompress.graph.sites._select import CONDITION as CONDITION
from jaxcompress.graph.sites._select import Side as Side
from jaxcompress.graph.sites._select import chosen_sites as chosen_sites
from jaxcompress.graph.sites._select import refuse_inside as refuse_inside
from jaxcompress.graph.sites._tap import tapping as tapping
from jaxcompress.graph.sites._trace import Traced as Traced
from jaxcompress.graph.sites._trace import call_of as call_of
from jaxcompress.graph.sites._trace import capture_call as capture_call
from jaxcompress.graph.sites._trace import describe_array as describe_array
from jaxcompress.graph.sites._trace import wraps as wraps
from jaxcompress.graph.sites._views import AxisFactors as AxisFactors
from jaxcompress.graph.sites._walk import costliest as costliest
